"""The comparison's table: what it says of who is better, and that the README has all of it."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

import peers
from lab import PROGRAM
from scenarios import NEVER

README = (PROGRAM.parent / "README.md").read_text()


@pytest.fixture
def arena() -> peers.Arena:
    """LinK and one peer, without hosts."""
    return peers.Arena([SimpleNamespace(label=name, words=name) for name in ("LinK", "ucarp")], {}, [])


def row(arena: peers.Arena, words: str) -> str:
    return next(line for line in arena.table() if line.startswith(f"| {words} |"))


def test_a_cell_is_the_median_and_the_worst_and_the_best_is_bold(arena: peers.Arena) -> None:
    for name, values in ("LinK", (0.15, 0.21, 0.14)), ("ucarp", (3.1, 3.2, 4.0)):
        arena.runs["host death", name] = [{peers.MEANWHILE: value} for value in values]
    assert row(arena, "host death: away") == "| host death: away | **0.15** (0.21) | 3.20 (4.00) |"
    assert arena.table()[-1].endswith("A peer is better at: nothing here.")


def test_where_a_peer_is_better_the_table_says_so(arena: peers.Arena) -> None:
    idle = {"holder CPU": 0.3, "holder RSS": 74.0, "holder sent": 13.0, "standby CPU": 0.3}
    arena.runs["at rest", "LinK"] = [idle]
    arena.runs["at rest", "ucarp"] = [{**idle, "holder RSS": 5.6}]
    assert row(arena, "at rest: the holder's memory, MB") == "| at rest: the holder's memory, MB | 74 | **5.60** |"
    assert arena.table()[-1].endswith("A peer is better at: at rest: the holder's memory, MB (ucarp).")


def test_what_was_not_over_when_nobody_looked_any_more_has_no_number(arena: peers.Arena) -> None:
    figures = {peers.MEANWHILE: 4.99, peers.HEALED: 8.3, "two after the end": 0.02, "new holder": NEVER, "away": 0.0}
    arena.runs["partition", "ucarp"] = arena.runs["move", "ucarp"] = [figures, figures]
    assert row(arena, "silent partition (its carrier stays): away").endswith("| - | > 5 (> 5) |")
    assert row(arena, "silent partition, healed: away").endswith("| - | > 8 (> 8) |")
    assert row(arena, "planned move: from the order until another host has it").endswith("| - | never (never) |")


def test_the_readme_has_every_row_and_its_picture() -> None:
    table = README.partition(peers.BEGIN)[2].partition(peers.END)[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [line.words for compared in peers.COMPARED for line in compared.lines]
    assert "A peer is better at: " in table and "FAILED" not in table
    assert "(docs/peers.svg)" in README
    words = {element.text for element in ElementTree.parse(peers.PICTURE).iter()}
    assert {"LinK", "keepalived, defaults", "answers the client", "the host that has it dies"} <= words
