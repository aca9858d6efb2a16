"""Tests of LinK. Run them by `./start.sh test`; the sections mirror link.py's.

This part needs no privileges: the table, every cell of the decision's space, configuration, frames, files, and the
HTTP API over a real socket in front of an agent whose network and ZooKeeper are make-believe (tests/fakes.py).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import fcntl
import functools
import http.client
import http.server
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import openapi_spec_validator
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import link
from fakes import ADDRESS, ASK, CLAIM, GIVE, MAC, METRICS, OTHER_MAC, VIP, WANT, AtOnce, ByHand, FakeNetwork
from link import Decision, Event, Facts, HealthCheck, Intent, Invalid, Lock, State, VirtualIP, make_config

# isort: split
from fakes import FakeReferee, Served, config_of, table, until

HERE = Path(__file__).parent
SOURCE = HERE / "link.py"
VIP6 = "fd77::100/128"


def threads(of: str) -> int:
    """How many there are of this kind now."""
    return sum(of in thread.name for thread in threading.enumerate())


def readme_table(header: str) -> list[list[str]]:
    """The rows below this header in README.md, without markup."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(header) + 2 :])
    return [[re.sub(r"[`*]", "", cell).strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


# == The file itself ===========================================================

TREE = ast.parse(SOURCE.read_text(encoding="utf-8"))

IMPORT_ALONE = """
import sys, threading
third, did = {"kazoo", "pyroute2", "scapy", "yaml"}, []
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in third:
            raise ImportError(name)
def hook(event, args):
    own = event == "open" and ("link.py" in str(args[0]) or "link.cpython" in str(args[0]))
    if not own and event.partition(".")[0] in ("open", "socket", "subprocess", "ctypes", "fcntl", "signal"):
        did.append((event, args))
for line in sys.argv[2].splitlines():  # what link takes from the standard library is not its doing
    exec(line)
sys.meta_path.insert(0, Blocked())
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
sys.addaudithook(hook)
import link
assert not did, did
assert not third & {name.partition(".")[0] for name in sys.modules}
assert threading.active_count() == 1
"""


def test_importing_link_does_no_io_and_needs_no_third_party_code():
    imports = [ast.unparse(node) for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)]
    standard = "\n".join(["import __future__", *(line for line in imports if "__future__" not in line)])
    subprocess.run([sys.executable, "-c", IMPORT_ALONE, str(HERE), standard], check=True)


def fields_of(part: ast.ClassDef) -> set[str]:
    """What an object of this class holds."""
    named = {n.target.id for n in part.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    stored = (n for n in ast.walk(part) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return named | {n.attr for n in stored if ast.unparse(n.value) == "self"}


def test_the_file_its_functions_and_classes_are_short_and_no_object_has_many_fields():
    text, nodes = SOURCE.read_text(encoding="utf-8"), [*ast.walk(TREE)]
    size = {n: (n.end_lineno or 0) - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    functions = sorted(lines for n, lines in size.items() if isinstance(n, ast.FunctionDef))
    assert functions[int(len(functions) * 0.9)] <= 30 and functions[-1] <= 45
    classes = {n.name: (lines, len(fields_of(n))) for n, lines in size.items() if isinstance(n, ast.ClassDef)}
    long = {name: lines for name, (lines, _) in classes.items() if lines > (400 if name == "Agent" else 350)}
    wide = {n: count for n, (_, count) in classes.items() if count > 15 and n not in ("Config", "Facts")}  # tables
    times = re.findall(r"^([A-Z_]+) = .*#.*\bseconds\b", text, re.MULTILINE)
    lines = text.count("\n")
    assert (lines > 4409, long, wide, times[9:]) == (False, {}, {}, []), lines  # the aim is 2,500


def test_nobody_asks_whether_there_is_a_zookeeper_and_no_library_is_named_that_is_not_used():
    wrong = r"isinstance\([\w.]*referee.*|if self\.coordinator.*|import pyroute2|\"pyroute2\""
    assert not re.findall(wrong, SOURCE.read_text("utf-8"))


def test_every_public_class_and_function_has_a_docstring():
    def bare(body: Iterable[ast.AST]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield from [] if ast.get_docstring(node) else [node.name]
                yield from bare(node.body) if isinstance(node, ast.ClassDef) else []

    assert list(bare(TREE.body)) == []


def test_nothing_sleeps_or_rests_on_the_wall_clock():
    names = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    assert not {"time.sleep", "time.time"} & names
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom) and node.module == "time"]


@table("library, part", [("scapy", "Frames"), ("kazoo", "Referee"), ("yaml", "Config")])
def test_each_library_is_named_in_one_part_only_and_never_scapy_all(library, part):
    users = {}
    for piece in SOURCE.read_text(encoding="utf-8").split("\n# == ")[1:]:
        title, _, body = piece.partition("\n")
        if names := re.findall(rf"^\s*(?:from|import) ({library}\S*)", body, re.MULTILINE):
            users[title] = names
    (title,) = users
    assert title.startswith(part) and "scapy.all" not in users[title]


# == State machine =============================================================

COLUMNS = ["fault", "elected", "demoted", "health_check_fail", "health_check_success"]
MATRIX = {
    "STANDBY": ["ACTIVATED", "ACTIVATED", "STANDBY", "FAILING", "STANDBY"],
    "ACTIVATED": ["ACTIVATED", "ACTIVATED", "STANDBY", "FAILING", "ACTIVATED"],
    "FAILING": ["FAILING", "FAILING", "FAILING", "FAILING", "STANDBY"],
}


def test_the_table_is_the_specification_total_and_shown_in_the_docstring_and_the_readme():
    table = {state.value: [link.TRANSITIONS[state, Event(word)].value for word in COLUMNS] for state in State}
    assert table == MATRIX and set(link.TRANSITIONS) == set(itertools.product(State, Event))
    lines = [line.split() for line in (link.__doc__ or "").splitlines()]
    start = lines.index(COLUMNS) + 1
    for rows in (lines[start : start + 3], readme_table("| state | " + " | ".join(COLUMNS) + " |")):
        assert {row[0]: row[1:] for row in rows} == MATRIX


# == Decision: every cell of State x Facts =====================================

INF, MOMENT, RUN = math.inf, 1.0, Intent.RUN  # MOMENT: who was heard so long ago is there
UNSAID = (Lock.NOBODY, Lock.WAITING, Lock.UNKNOWN)  # ZooKeeper does not say whose it is
HEALTH = [(True, False, 0), (True, True, 0), (False, True, 0), (True, True, 4), (False, True, INF), (False, False, 0)]
UNREAD = ("staying", "trusted", "lower", "slack", "given", "taken", "leaving", "alone")  # by at_most_one()


def off(f: Facts) -> bool:
    """ZooKeeper is away."""
    return f.lock is Lock.UNKNOWN


def rivalled(f: Facts) -> bool:
    """Another host was heard since we bound the address."""
    return f.bound is not None and f.heard < INF


# Values on both sides of each threshold, as far as they can be with the facts before them.
SPANS: dict[str, Callable[[Facts], Iterable[Any]]] = {
    "lock": lambda f: Lock,
    "intent": lambda f: Intent,
    "bound": lambda f: (None, 0.5, 5),
    "leaving": lambda f: [  # it is bound here, and to be let go, or perhaps
        *[None] * (f.bound is None or (f.lock is not Lock.OTHER and f.intent is RUN)),
        *[0.02, 0.5 if f.bound == 0.5 else 2] * (f.bound is not None and (
            f.lock in (Lock.OTHER, Lock.UNKNOWN) or f.intent is not RUN))],
    "heard": lambda f: (
        s for s in (0.01, 0.5, 2, INF) if s == INF or f.bound is None or s <= (f.leaving or f.bound)),
    "alone": lambda f: [f.heard] if f.heard < INF else (0.5, 2),
    "pace": lambda f: [0.05],  # only how long a rival must stay depends on it
    "staying": lambda f: [s for s in (0, 0.3, 0.45, 1) if s + f.heard <= (f.bound or 0)] or [0],
    "next second": lambda f: [
        (False, False),
        *[(True, False)] * (f.lock in (Lock.OTHER, Lock.WAITING) and (f.bound is None or f.intent is RUN)),
        *[(True, False), (False, True)] * (off(f) and f.bound is None)],
    "met": lambda f: (False, True) if f.heard < INF and (f.next or f.bound is None) else [False],
    "successor": lambda f: [
        f.lock is Lock.OTHER,
        *[True] * (f.bound is not None and f.intent is Intent.DELETE and f.lock not in (Lock.OTHER, Lock.NOBODY))],
    "unanswered needed blind": lambda f: [
        (0, 3, False), (0, 0, False), *[(3, 3, False)] * (f.heard > 0.1),
        *[(0, 3, True), (3, 3, True)] * (f.heard > MOMENT or (f.bound is not None and f.lock is Lock.OTHER))],
    "nameless": lambda f: [False],  # for the words alone
    "deaf": lambda f: (0, 2, 11) if f.bound is not None else (0, 0.5, 2, 11),
    "empty": lambda f: (0.5, 3) if f.lock is Lock.NOBODY and f.bound is None and f.heard < INF else [0],
    "trusted": lambda f: (False, True) if f.bound is not None else [True],
    "lower": lambda f: (False, True) if rivalled(f) and f.lock in UNSAID else [False],
    "slack": lambda f: (0.05, 0.15) if rivalled(f) and f.leaving is not None else [0.05],
    "given": lambda f: (False, True) if off(f) else [False],
    "taken": lambda f: (False, True) if off(f) and rivalled(f) and f.leaving is not None else [False],
    "healthy unsure rank": lambda f: [
        h for h in HEALTH[: 3 if f.bound is not None else 6]
        if not (h[1] and f.given) and (h[0] or f.bound is None or not off(f) or f.leaving is not None)],
}  # fmt: skip


class Cell(NamedTuple):
    """A state and facts; the events that are asked for one after the other; where that ends; what follows."""

    old: State
    f: Facts
    events: tuple[Event, ...]
    new: State
    d: Decision
    here: bool  # the kernel has the address
    runs: bool
    fit: bool  # healthy, and not a standby that hears nobody
    proven: bool  # so many questions had no answer
    silent: bool  # and this host would hear it
    served: bool  # another host has the IP, as far as is known
    waits: bool  # a standby that is not to contend
    relieved: bool  # who is to have it is heard; of who lets go, only what was heard since then counts
    yields: bool  # bound without a lock, against the better claim of a rival on the wire
    gone: bool  # past the limit, and the wire cannot tell
    doubts: bool  # perhaps about to fail, and the IP may be served elsewhere


def every_fact(but: Collection[str] = ()) -> Iterable[Facts]:
    def widened(facts: Iterable[Facts], names: list[str], span: Any) -> Iterator[Facts]:
        for f in facts:
            for value in span(f):
                yield f._replace(**dict(zip(names, value if names[1:] else [value], strict=True)))

    facts: Iterable[Facts] = [Facts()]
    for names, span in SPANS.items():
        facts = facts if names in but else widened(facts, names.split(), span)
    return facts


def cells_of(f: Facts, decide: Callable[[State, Facts], Decision]) -> Iterator[Cell]:
    here, runs, proven = f.bound is not None, f.intent is RUN, f.unanswered >= f.needed > 0
    silent = proven and (f.deaf == 0 or ((off(f) or f.lock is Lock.NOBODY) and f.deaf > 10))
    served = f.heard < INF and not proven
    named = f.lock is Lock.OTHER or f.taken
    after = here and f.bound - f.heard >= 2 * f.slack  # else it may go for us
    rival = rivalled(f) and f.heard <= MOMENT and not proven
    known = (
        here, runs, f.healthy and (here or f.deaf <= MOMENT or (f.met and not proven)), proven, silent, served,
        f.unsure or (f.lock is Lock.NOBODY and served and f.empty < 1),
        named and rival and after and f.heard + f.staying >= f.slack and not (f.given and runs),
        rival and f.lock in UNSAID and not (f.given or f.taken) and f.staying >= link.patience(f),
        f.lock is Lock.OTHER and (f.leaving or 0) > MOMENT and (f.blind or not f.needed or f.deaf > 0),
        f.unsure and not here and not silent,
    )  # fmt: skip
    decided = {state: decide(state, f) for state in State}
    for old in State:
        new, events = old, []
        while (event := decided[new].event) is not None and len(events) <= 4:
            events.append(event)
            new = link.TRANSITIONS[new, event]
        yield Cell(old, f, tuple(events), new, decided[new], *known)


STEP: Callable[[State, Event], State] = lambda *at: link.TRANSITIONS[at]  # noqa: E731
PROMISES: dict[str, Callable[[Cell, Facts], Any]] = {
    "every decision says why, and asks for no event in vain": lambda c, f: c.d.event is None and c.d.reason and not any(
        one is two for one, two in itertools.pairwise(itertools.accumulate(c.events, STEP, initial=c.old))),
    "health alone decides who is failing": lambda c, f: (c.new is State.FAILING) is (not c.fit),
    "elected means that the lock is ours": lambda c, f: Event.ELECTED not in c.events or f.lock is Lock.MINE,
    "what ZooKeeper gave to another host is never taken": lambda c, f: (
        f.lock is not Lock.OTHER or c.here or not c.d.wanted),
    "who is asked to go takes nothing": lambda c, f: c.runs or c.here or not c.d.wanted,
}  # fmt: skip
OF_AT_LEAST_ONE: dict[str, Callable[[Cell, Facts], Any]] = {
    "demoted means that another host is better, or that this one is asked to go": lambda c, f: (
        Event.DEMOTED not in c.events or f.lock is Lock.OTHER or c.relieved or c.yields
        or (not c.here and f.heard <= MOMENT and (f.lock is not Lock.MINE or c.doubts))
        or (not c.runs and (not c.here or f.intent is Intent.DELETE))),
    "fault means that ZooKeeper names nobody, and nobody is heard or the holder gives it": lambda c, f: (
        Event.FAULT not in c.events or (f.lock is Lock.NOBODY and f.unsure and c.silent and f.alone > MOMENT)
        or ((off(f) or (f.lock is Lock.WAITING and f.next and f.met)) and (c.silent or f.blind or f.given))),
    "a bound address is let go only to another host, by a DELETE, or past the limit where the wire cannot tell": (
        lambda c, f: c.d.wanted or not c.here or c.relieved or c.yields or c.gone or f.intent is Intent.DELETE),
    "a silent address stays bound, whatever is asked but its deletion": lambda c, f: (
        c.d.wanted or not c.here or not c.silent or c.gone or f.intent is Intent.DELETE),
    "a relieved host lets go, and without a lock the better claim is yielded to": lambda c, f: (
        not (c.yields or c.relieved) or not (c.d.wanted or c.new is State.ACTIVATED)),
    "what somebody answers for is taken only with the lock or by its holder's word": lambda c, f: (
        not c.d.wanted or c.here or not c.served or f.blind or f.lock is Lock.MINE or f.given
        or (f.heard > MOMENT and c.old is State.ACTIVATED)),
    "nothing is taken before the look is over, but with the lock, by the holder's word or what was removed by hand": (
        lambda c, f: not c.d.wanted or c.here or c.silent or f.blind or f.lock is Lock.MINE or f.given
        or c.old is State.ACTIVATED),
    "exactly the fit hosts that are to run contend; an empty queue belongs first to who has the IP": lambda c, f: (
        c.d.contend is (c.fit and c.runs and (c.here or not c.waits))),
    "who doubts its health leaves the queue, and an IP that is served where it is": lambda c, f: (
        not (c.doubts and f.lock is Lock.MINE and c.fit and c.runs and c.old is not State.ACTIVATED)
        or (c.new is State.STANDBY and len(c.events) <= 1 and not c.d.contend and not c.d.wanted)),
    "a fit running holder of a confirmed lock has the address": lambda c, f: (
        not (f.lock is Lock.MINE and c.fit and c.runs)
        or (c.doubts and (c.old is not State.ACTIVATED or f.heard <= MOMENT))
        or (c.d.wanted and c.new is State.ACTIVATED and (c.d.contend or f.unsure))),
    "without ZooKeeper a fit host takes what nobody answers for, and what it is given": lambda c, f: (
        not (off(f) and c.fit and c.runs and (c.silent or f.blind or f.given)) or c.yields or c.relieved
        or (c.d.wanted and c.new is State.ACTIVATED)),
    "a failing host takes an address exactly when it is an orphan, and those before it had their time": lambda c, f: (
        c.fit or c.here or c.d.wanted is (
            f.lock in (Lock.NOBODY, Lock.UNKNOWN) and c.silent and f.alone > 1 + 0.3 * f.rank and c.runs)),
    "a running standby next in the queue that is not deaf, and nobody else, accuses a silent holder": lambda c, f: (
        c.d.accuse is (f.met and c.proven and f.deaf == 0 and f.next and f.lock is Lock.OTHER and c.runs
                       and c.new is State.STANDBY)),
    "a deleted address waits for a successor, but not for long, and is never bound anew": lambda c, f: (
        f.intent is not Intent.DELETE or c.d.wanted is (c.here and (f.lock is Lock.WAITING or f.successor) and (
            f.leaving or 0) <= MOMENT and not c.relieved and not c.yields)),
    "nobody announces who is not to have the address, goes, doubts its right, or is deaf without the lock": (
        lambda c, f: not c.d.announce or (c.d.wanted and c.runs and (f.trusted or not c.here)
            and f.lock is not Lock.OTHER and (f.lock is Lock.MINE or f.given or f.deaf == 0))),
    "a holder by the lock, or by its holder's word, announces": lambda c, f: (
        c.d.announce or not (f.lock is Lock.MINE or f.given) or not f.trusted or not c.runs or not c.here or f.taken),
    "the wire is asked by all but who has the lock": lambda c, f: (
        (c.d.look is link.Look.NONE) is bool((c.here and f.lock is Lock.MINE and c.runs) or f.blind or not f.needed)),
    "everybody is asked by who may go or is in doubt, and at full pace by who is next": lambda c, f: (
        c.d.look is link.Look.NONE or c.d.look is link.Look.SEARCH if c.here and (
            f.lock is Lock.OTHER or f.leaving is not None or not f.trusted)
        else c.d.look in (link.Look.NONE, link.Look.FAST) or c.here or not f.next or off(f)),
}  # fmt: skip
OF_AT_MOST_ONE: dict[str, Callable[[Cell, Facts], Any]] = {
    "the address is here exactly while fit and running with a confirmed lock": lambda c, f: (
        c.d.wanted is (f.lock is Lock.MINE and c.fit and c.runs and (c.here or not f.unsure))
        is (c.new is State.ACTIVATED) and Event.FAULT not in c.events and not c.d.accuse),
    "the queue is left only after the address is gone": lambda c, f: (
        c.d.contend is (c.here or (c.fit and c.runs and not c.waits))),
}  # fmt: skip
KEPT = {link.decide: {**PROMISES, **OF_AT_LEAST_ONE}, link.at_most_one: {**PROMISES, **OF_AT_MOST_ONE}}


@functools.cache
def broken(decide: Any) -> tuple[int, dict[str, list[Cell]]]:
    """How many cells there are, and where a promise is not kept."""
    found: dict[str, list[Cell]] = {name: [] for name in KEPT[decide]}
    promises, count = tuple(KEPT[decide].items()), 0
    for f in every_fact(() if decide is link.decide else UNREAD):
        for cell in cells_of(f, decide):
            count += 1
            for name, kept in promises:
                if not kept(cell, f):
                    found[name].append(cell)
    return count, found


def test_the_space_is_large_and_no_two_facts_are_the_same():
    assert broken(link.decide)[0] > 540_000 and broken(link.at_most_one)[0] > 80_000
    assert {name for names in SPANS for name in names.split()} == set(Facts._fields)
    sample = [*itertools.islice(every_fact(), 0, None, 9)]
    assert len(sample) == len(set(sample))


@table("decide, name", [(decide, name) for decide, promises in KEPT.items() for name in promises])
def test_in_every_cell(decide, name):
    cells = broken(decide)[1][name]
    assert not cells, f"{len(cells)} cells, e.g. {cells[:3]}"


@table("pace", [0.005, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 1.3])
@table("trust", [*itertools.product((True, False), repeat=2)])
def test_of_two_binders_who_meet_without_a_lock_one_is_patient(trust, pace):
    """Never both at once: at first who came late or does not trust itself, then the higher MAC, last the lower one.

    Nor at the same answer, however slowly they come, where both ask at one pace.
    """
    sides = [*itertools.product(UNSAID, (0.05, 0.3, 0.9, 1.1, 60), (0.0, 0.2))]
    for pair in itertools.product(sides, sides):
        a, b = (
            link.patience(Facts(lock=lock, bound=age + ago, heard=ago, trusted=trusted, lower=lower, pace=pace))
            for (lock, age, ago), trusted, lower in zip(pair, trust, (True, False), strict=True)
        )
        assert abs(a - b) >= 0.1 and math.ceil(a / pace) != math.ceil(b / pace), (pair, a, b)


# == Addresses and checks ======================================================

ACCEPTED = {
    "10.0.0.10": "10.0.0.10/32", "10.0.0.10/24": "10.0.0.10/24", "10.0.0.10/255.255.255.0": "10.0.0.10/24",
    "10.0.0.0/31": "10.0.0.0/31", "10.0.0.0": "10.0.0.0/32", "203.0.113.255/16": "203.0.113.255/16",
    "fd77::100": "fd77::100/128", "FD77:0:0::0100/64": "fd77::100/64", "2001:db8::/127": "2001:db8::/127",
}  # fmt: skip
REFUSED_ADDRESSES = {
    "10.0.0.0/24": "network", "10.0.0.255/24": "broadcast", "255.255.255.255": "broadcast", "224.0.0.18": "multicast",
    "240.0.0.1": "not a host's",
    "127.0.0.1": "loopback", "0.0.0.0": "", "0.1.2.3": "not a host", "169.254.1.1": "link-local",
    "10.0.0.10/0": "length 0", "fd77::/64": "network", "ff02::1": "multicast", "::1": "loopback", "::": "unspecified",
    "fe80::1": "link-local", "fe80::1%eth0": "", "fd77::1%eth0": "scope", "::ffff:10.0.0.1": "",
    "::ffff:127.0.0.1": "", "fd77::1/0": "length 0", "10.0.0.10/33": "", "10.0.0.10/-1": "", "10.0.0.256": "",
    "10.0.0.010": "", "fd77::1::2": "", " 10.0.0.10": "", "10.0.0.10\n": "", "10.0.0.10/24/24": "", "node1": "", "": "",
    **dict.fromkeys((None, 0, 167772170, 10.5, True, b"10.0.0.10"), ""),
}  # fmt: skip


@table("text, shown", ACCEPTED.items())
def test_an_address_that_hosts_can_share_is_accepted(text, shown):
    assert str(link.parse_address(text)) == shown


@table("text, why", [*REFUSED_ADDRESSES.items(), (["10.0.0.10"], ""), ({"ip": "10.0.0.10"}, "")])
def test_an_address_that_nobody_can_share_is_refused_with_the_reason(text, why):
    with pytest.raises(Invalid) as error:
        VirtualIP.parse({"ip": text}, 5)
    assert error.value.body["error"] == "invalid IP"
    assert error.value.body["detail"] and why in error.value.body["detail"]


RIGHT_CHECK = {"type": "HTTP", "host": "10.0.0.1", "port": 80}
WRONG_CHECKS = {
    "type": ["UDP", None, 5, ["TCP"]], "host": ["", "a b", "a/b", 5, None], "colour": ["red"],
    "port": [0, 65536, -1, "80", 80.5, True, None, [80]], "path": ["status", "/a b", "/\r\nX: y", "/\u00e4", 5],
}  # fmt: skip


@table("raw", [{**RIGHT_CHECK, k: v} for k, some in WRONG_CHECKS.items() for v in some] + ["TCP", None, [], {}])
def test_a_wrong_health_check_is_refused(raw):
    with pytest.raises(Invalid) as error:
        HealthCheck.parse(raw)
    assert error.value.body["detail"]


def test_a_virtual_ip_is_stored_and_read_back_unchanged_and_the_kernel_gets_the_address_alone():
    checks = [{**RIGHT_CHECK, "host": "::1", "path": "/ok?x=1"}, {"type": "tcp", "host": "h", "port": 65535}]
    vip = VirtualIP.parse({"id": "vip-1", "ip": "fd77::100", "checks": checks, "healthcheck_interval": 3600}, 5)
    assert VirtualIP.parse(vip.to_json(), 7) == vip
    assert vip.to_json()["checks"][1] == {"type": "TCP", "host": "h", "port": 65535, "path": "/"}
    assert VirtualIP.parse({"ip": "10.0.0.10"}, 7).healthcheck_interval == 7
    for text, *wanted in (("10.0.0.10/24", "10.0.0.10", VIP), ("fd77::100/64", "fd77::100", VIP6)):
        vip = VirtualIP.parse({"ip": text}, 5)
        assert (vip.to_json()["ip"], vip.address, str(vip.bound)) == (text, *wanted)


# == Configuration =============================================================


@table("depth, wanted", [*enumerate([("/var/lib/link", 1000), ("file", 7), ("environment", 8), ("flag", 9)])])
def test_flags_beat_the_environment_beats_the_file_beats_the_default(tmp_path, monkeypatch, depth, wanted):
    path = tmp_path / "link.yml"
    path.write_text("interface: eth0\n" + ("state_dir: file\nmax_ips: 7\n" if depth > 0 else ""))
    for key, value in {"LINK_STATE_DIR": "environment", "LINK_MAX_IPS": "8"}.items() if depth > 1 else ():
        monkeypatch.setenv(key, value)
    config, check = link.load(["--config", str(path), *(["--state-dir", "flag", "--max-ips=9"] if depth > 2 else [])])
    assert (config.state_dir, config.max_ips, check) == (*wanted, False)


def test_the_environment_can_hold_lists_and_secrets_and_zookeeper_alone_may_go_without_probes():
    environ = {"LINK_IPS": '[{"ip": "10.0.0.10"}]', "LINK_USER": "u", "LINK_PASSWORD": "1234", "LINK_LISTEN": "[::]:80"}
    config = make_config({"interface": "eth0"}, environ, {})
    assert [str(vip.ip) for vip in config.virtual_ips] == [VIP]
    assert (config.password, config.listen_address) == ("1234", ("::", 80))
    assert config.virtual_ips == make_config({"interface": "eth0"}, environ, {}).virtual_ips  # the ids, too
    assert make_config({"interface": "eth0", "listen": "localhost:80"}, {}, {}).listen_address == ("127.0.0.1", 80)
    given = {"interface": "eth0", "zookeeper": "z:1", "probe_count": 0, "witnesses": ["FE80::0099", "10.0.0.9"]}
    assert make_config(given, {}, {}).witness_addresses == ["fe80::99", "10.0.0.9"]  # as the wire spells them


BAD_VALUES: dict[str, list[tuple[Any, str]]] = {  # key: value, or several keys; a word of the remedy
    "interface": [("", "required"), ("eth0/1", "not an interface name"), ("a" * 16, "not an interface name")],
    "hostname": [("node 1", "not a host name"), ("..", "not a host name")],
    "zookeeper": [(text, "host:port") for text in (
        "zk1", "zk1:2181,,zk2:2181", "zk1:99999", "zk1:0/x", "z:1 /x", "z:1/a/../b", "z:1/a//b", "u@zk:2181", "z?:2181",
        "zk..local:2181", ".zk:2181", "a" * 64 + ":2181", "a." * 127 + "a:2181", "zk1:٢181", "[zk]:2181", "[fd77::11]",
        "[fd77:::1]:2181", "[10.0.0.1]:2181")]
    + [(text, "into brackets") for text in ("fd77::11:2181", "zk1:2181,::1:2181", "fd77::11")],
    "zookeeper_auth": [("secret", "user:password")],
    "zookeeper_tls_cert": [("c.pem", "zookeeper_tls_key")],
    "session_timeout": [
        (0, "use 1 "), ("soon", "number"), (True, "number"), (math.nan, "range"), (math.inf, "range"),
        ({"promise": "at-most-one", "zookeeper": "z:2181", "session_timeout": 1.5}, "2 s or more"),
    ],
    "listen": [(text, "e.g. 127.0.0.1:1313") for text in ("1313", ":1313", "127.0.0.1:x", "127.0.0.1:65536", "a b:1")],
    "user": [("admin", "password"), ({"listen": "0.0.0.0:1313"}, "required")],
    "password": [("secret", "needs user")],
    "tls_cert": [
        ("c.pem", "tls_key"), ({"tls_key": "k.pem"}, "tls_key"),
        ({"tls_cert": str(SOURCE), "tls_key": str(SOURCE)}, f"{SOURCE}: not PEM files")],
    "zookeeper_tls_ca": [("/nonexistent.pem", "/nonexistent.pem"), (str(SOURCE), "not PEM files")],
    "health_check_interval": [(0, "use 1 "), (3601, "3600"), (1.5, "whole number"), ("x", "whole number")],
    "health_check_timeout": [(0, "use 0.1 ")],
    "health_check_fall": [(0, "use 1 ")],
    "health_check_rise": [(0, "use 1 ")],
    "probe_interval": [(0.001, "use 0.005 "), ({"probe_interval": 2, "session_timeout": 4}, "lower one")],
    "probe_count": [(-1, "use 0 "), (1, "2 or more"), (0, "set it, or use 2")],
    "witnesses": [(["gateway"], "address"), ("gateway", "list"), (["fe80::1%eth0"], "leave out the scope"),
                  ([90], "text"), ({"witnesses": ["10.0.0.10"], "ips": [{"ip": VIP}]}, "one of ips")],
    "promise": [("two", "at-least-one, at-most-one"), ("at-most-one", "set zookeeper")],
    "max_ips": [(0, "use 1 "), *((value, "whole number") for value in (True, "1.5", [1], math.nan))],
    "state_dir": [("a\0b", "control characters"), ("\x1b[2J", "control"), ("\udc80", "control"), ("", "whole path")],
    "ips": [
        ({"max_ips": 1, "ips": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}, "raise max_ips"),
        ({"zookeeper": "z:1,10.0.0.1:2181", "ips": [{"ip": "10.0.0.1"}]}, "10.0.0.1 is an address that ZooKeeper has"),
        ({"zookeeper": "[fd77::1]:2181,z:1", "ips": [{"ip": "fd77::1"}]}, "ZooKeeper has for itself; remove it"),
        ({"zookeeper": "[FD77::1]:2181/x", "ips": [{"ip": "fd77::1"}]}, "ZooKeeper has for itself; remove it"),
        ({"ips": {"ip": "10.0.0.1"}}, "list"), (["10.0.0.1"], "object"), ([{"ip": "10.0.0.0/8"}], "network address"),
        ([{"ip": "10.0.0.1", "colour": 1}], "'colour'"), ([{"ip": "10.0.0.1", "id": 5}], "id"),
        ([{"ip": "10.0.0.1"}, {"ip": "10.0.0.1/24"}], "remove one"),
    ],
    "log_level": [("LOUD", "DEBUG, INFO, WARNING, ERROR")],
    "zookeeper_root": [("/x", "chroot")], "on_fault": [("hold", "at-most-one")], "announce_interval": [(0, "60 s")],
    **{key: [(1, f"remove it: {remedy}")] for key, remedy in link.REMOVED.items() if "it is" in remedy},
}  # fmt: skip


@table("key, value, remedy", [(key, *row) for key, rows in BAD_VALUES.items() for row in rows])
def test_a_wrong_value_is_refused_naming_the_key_and_the_remedy(key, value, remedy):
    with pytest.raises(link.ConfigError) as error:
        given = value if isinstance(value, dict) else {key: value}
        link.tls_context(make_config({"interface": "eth0", **given}, {}, {}))
    assert str(error.value).startswith(f"{key}: ") and remedy in str(error.value)
    assert "secret" not in str(error.value)


@table("text, servers, root", [
    ("z1:2181,[fd77::11]:2181/", "z1:2181,[fd77::11]:2181", "/link"), ("z.:1/a/b/", "z.:1", "/a/b/link"),
    ("Zk-1_a.Example.org:2181", "Zk-1_a.Example.org:2181", "/link"), ("10.0.0.1:1/link", "10.0.0.1:1", "/link/link"),
])  # fmt: skip
def test_the_locks_are_below_link_of_the_chroot_and_kazoo_takes_what_check_takes(text, servers, root):
    from kazoo.hosts import collect_hosts

    assert make_config({"interface": "eth0", "zookeeper": text}, {}, {}).ensemble == (servers, root)
    for host, port in collect_hosts(servers)[0]:
        assert host.encode("idna") and 0 < port < 65536


@table("where", ["file", "environment"])
def test_a_removed_key_is_refused_wherever_it_is_given(tmp_path, monkeypatch, capsys, where):
    (tmp_path / "link.yml").write_text("interface: eth0\n" + "announce_interval: 0" * (where == "file"))
    monkeypatch.setenv("LINK_ANNOUNCE_INTERVAL" if where == "environment" else "X", "0")
    assert link.main(["--check", "--config", str(tmp_path / "link.yml")]) == 2
    assert "announce_interval: is no key any more" in capsys.readouterr().err


BAD_FILES = {
    b"interfaces: eth0": "unknown key 'interfaces'; see link.py --help", b"1: eth0": "unknown key '1'",
    b"- interface": "mapping", b"eth0": "mapping", b"interface: [": "not valid YAML",
    b"interface: !!python/object:os.system {}": "not valid YAML", b"interface: \xff": "cannot be read",
    b"interface: eth0\nips: []\nips: []": "line 2, column 1: a key is there twice", b"ips: [{ip: a, ip: b}]": "twice",
    b"interface: 2026-13-45": "a value cannot be read", b"max_ips: " + b"9" * 5000: "a value cannot be read",
    **dict.fromkeys((b"user: !!bool maybe", b"user: !!int ''", b"user: !!timestamp x"), "a value cannot be read"),
    b"interface:\teth0": "line 1, column 11: found character", b"interface: eth0\n---\n": "another document",
    b"user: \x1b": "a value cannot be read", b"ips: " + b"[" * 9999: "a value cannot be read", None: "cannot be read",
}  # fmt: skip


@table("content, why", BAD_FILES.items())
def test_a_file_that_cannot_be_used_is_refused_with_its_name(tmp_path, content, why):
    path = tmp_path / "link.yml"
    path.write_text("# nothing yet\n")
    assert link.read_config(str(path)) == {}
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(link.ConfigError) as error:
        link.read_config(str(path))
    assert str(path) in str(error.value) and why in str(error.value)


@table("wrote", [
    "'S3CRET", '"S3CRET" x', "S3CRET: x", "*S3CRET", "!S3CRET", "@S3CRET", "%S3CRET", "`S3CRET", "|S3CRET", "[S3CRET]",
    "{S3CRET: x}", "? S3CRET", '"S3CRET\\e"', "!!binary UzNDUkVU", "- S3CRET", "\n\tS3CRET",
])  # fmt: skip
@table("key", ["password", "zookeeper_auth", "on_change"])
def test_no_error_shows_a_secret(tmp_path, capsys, key, wrote):
    (tmp_path / "link.yml").write_text(f"interface: eth0\nuser: u\n{key}: {wrote}\n")
    assert link.main(["--check", "--config", str(tmp_path / "link.yml")]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"link.py: ({key}|{tmp_path}/link.yml): ", said) and "S3CRET" not in said


def test_a_variable_that_is_no_key_is_warned_of_by_name_alone_at_a_check_and_at_a_start(tmp_path, monkeypatch, capsys):
    """Docker and Kubernetes set LINK_PORT and the like beside a service of that name: nothing to refuse a start for."""
    for name, value in (("LINK_PROBE_INTERVALL", "s3cret"), ("LINK_INTERFACE", "lo"), ("LINK_listen", "x"), ("X", "y")):
        monkeypatch.setenv(name, value)
    words = ["--state-dir", str(tmp_path), "--listen", "127.0.0.1:0"]
    assert link.main(["--check", *words]) == 0
    said = capsys.readouterr().err
    with open(tmp_path / "lock", "w", encoding="ascii") as lock:  # so that it ends at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, str(SOURCE), *words]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=20)
    assert done.returncode == 3
    for text in (said, done.stderr):
        assert re.findall(r"(\w+) in the environment", text) == ["LINK_PROBE_INTERVALL", "LINK_listen"], text
        assert "s3cret" not in text


CHECKS_OF_THE_CONFIGURATION = {
    "--interface eth0": (0, "configuration OK"), "--interface eth0 --listen 0.0.0.0:1": (2, "user: required"),
    "": (2, "interface: required"), "--config /nonexistent.yml": (2, "/nonexistent.yml: cannot be read"),
}  # fmt: skip


@table("words, code, says", [(words, *row) for words, row in CHECKS_OF_THE_CONFIGURATION.items()])
def test_check_tells_right_from_wrong_and_touches_nothing(tmp_path, monkeypatch, capsys, words, code, says):
    monkeypatch.chdir(tmp_path)
    assert link.main(["--check", "--state-dir", str(tmp_path / "state"), *words.split()]) == code
    assert says in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", ">/dev/full", "2>/dev/full"])
def test_a_check_is_right_also_where_its_output_is_closed_or_its_disk_is_full_so_a_reload_is_not_refused(closed):
    """Of an agent whose stdout is a file on that disk, say."""
    command = f"{sys.executable} {SOURCE} --check --interface lo 2>/dev/null {closed}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0


@table("below", ["", "/state", "/x/../state/deep"])
@table("link_to", [None, "file", "nowhere"])
def test_check_says_where_a_state_directory_cannot_be(tmp_path, capsys, below, link_to):
    (tmp_path / "file").touch()
    if link_to:
        (tmp_path / "link").symlink_to(tmp_path / link_to)
    wrong = tmp_path / ("link" if link_to else "file")
    assert link.main(["--check", "--interface", "eth0", "--state-dir", f"{wrong}{below}"]) == 2
    said = capsys.readouterr().err
    assert f"state_dir: {wrong} is no directory: name another one, or remove it" in said


def test_check_reads_the_state_directory_and_changes_nothing_there(tmp_path, capsys):
    words = ["--check", "--interface", "eth0", "--state-dir", str(tmp_path)]
    (tmp_path / "ips.json").write_text('{"ips": [{"ip": "10.0.0.0/8"}, {"ip": "10.0.0.10"}]}')
    (tmp_path / "ips.journal").write_text("nonsense\n")
    assert link.main(words) == 0
    said = capsys.readouterr()
    assert "10.0.0.0/8 is a network address" in said.err and '"nonsense" is no IP' in said.err and said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ips.journal", "ips.json"]
    (tmp_path / "ips.json").unlink()
    (tmp_path / "ips.json").mkdir()  # an error of reading, also for root
    assert link.main(words) == 1


def test_a_wrong_configuration_exits_2_and_a_second_agent_exits_3(tmp_path):
    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, str(SOURCE), *words]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=20)
        return done.returncode, done.stderr

    code, said = run("--interface", "", "--state-dir", str(tmp_path / "state"))
    assert code == 2 and "interface: required" in said and not (tmp_path / "state").exists()
    assert run("--no-such-flag")[0] == 2
    with open(tmp_path / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = run("--interface", "lo", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    assert code == 3 and str(tmp_path) in said
    (tmp_path / "ips.journal").mkdir()
    code, said = run("--interface", "lo", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    assert code == 1 and f"failed: [Errno 21] Is a directory: '{tmp_path}/ips.journal'" in said and "Trace" not in said


def test_one_agent_per_interface_and_state_directory_and_nobody_else_can_hold_their_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "RUN", tmp_path / "run")
    first = config_of(tmp_path / "a")
    held = link.lock(first)
    for second in (config_of(tmp_path / "b"), config_of(tmp_path / "a", interface="eth1")):
        with pytest.raises(BlockingIOError):
            link.lock(second)
    for path in (tmp_path / "run", tmp_path / "a", *(tmp_path / "run").iterdir(), tmp_path / "a" / "lock"):
        assert not path.stat().st_mode & 0o077
    others = link.lock(config_of(tmp_path / "c", interface="eth2"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as squatter:
        squatter.bind("\0link on eth3")
        others += link.lock(config_of(tmp_path / "d", interface="eth3"))
    assert len(held) == 2 and len(others) == 4
    (tmp_path / "file").write_text("")
    others += link.lock(config_of(tmp_path / "file", interface="eth4"))
    assert len(others) == 5, "where the state directory cannot be"
    for lock in (*held, *others):
        os.close(lock)


LEAVE = """
import os, signal, sys, types; sys.path.insert(0, sys.argv[1])
import link
say = "import signal; print(signal.SIGTERM in signal.sigpending(), signal.SIGTERM in signal.pthread_sigmask(0, []))"
loop = types.SimpleNamespace(post=lambda *_: 0)
agent = types.SimpleNamespace(start=lambda: 0, vips=[1], loop=loop, stop=0, save=lambda: 0)
agent.run = lambda: signal.raise_signal(signal.SIGTERM)
agent.execute = lambda: os.execv(sys.executable, [sys.executable, "-c", say])
link.Api, link.serve_api = lambda *_: agent, lambda *_: 0
link.serve(link.make_config({"interface": "eth0"}, {}, {}), [], lambda: None)
"""


def test_a_sigterm_right_before_the_exec_of_a_reload_is_left_to_the_next_program():
    done = subprocess.run([sys.executable, "-c", LEAVE, str(HERE)], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True True\n"


def test_a_number_where_text_is_wanted_is_refused_since_yaml_may_have_changed_it(tmp_path):
    for text in ("password: 01234", "hostname: 0x10", "user: 1:30"):
        with pytest.raises(link.ConfigError, match=r"in quotes where YAML takes it for a number") as error:
            config_of(tmp_path, **{"password": "x", "user": "x", **yaml.safe_load(text)})
        assert not re.search(r"\d", str(error.value))
    assert link.make_config({"interface": "eth0"}, {"LINK_HOSTNAME": "16"}, {}).hostname == "16"


def test_a_certificate_that_cannot_be_used_is_found_by_a_check_and_stops_no_start(tmp_path, capsys):
    file = tmp_path / "link.yml"
    file.write_text(f"interface: eth0\ntls_cert: {SOURCE}\ntls_key: {SOURCE}\n")
    assert link.load(["--config", str(file)])[0].tls_cert == str(SOURCE)
    assert link.main(["--config", str(file), "--check"]) == 2
    assert f"tls_cert: {SOURCE}, {SOURCE}: not PEM files" in capsys.readouterr().err


class Reloaded:
    """An Upgrade whose proofs, one after the other, end as `proofs` says when they are let go."""

    def __init__(self, monkeypatch: Any, config: Path, *proofs: int) -> None:
        self.posted, self.begun, self.goes = queue.SimpleQueue[Any](), queue.SimpleQueue[int](), threading.Event()
        self.said, left = list[str](), iter(proofs)

        def run(command: list[str], **_: object) -> SimpleNamespace:
            self.begun.put(1)
            self.goes.wait(10)
            code = next(left)
            return SimpleNamespace(returncode=max(0, code), stdout=b"" if code else link.CHECKED)

        monkeypatch.setattr(subprocess, "run", run)
        made = link.load(["--config", str(config)])[0]
        self.agent = SimpleNamespace(clock=SimpleNamespace(now=lambda: 0.0), stopping=None, execute=None, config=made)
        self.agent.loop, self.agent.busy = SimpleNamespace(post=lambda *call: self.posted.put(call)), lambda: False
        self.agent.vips, self.agent.network = {}, SimpleNamespace(name=made.interface)
        self.upgrade = link.Upgrade(self.agent, ["--config", str(config)], {})

    def turn(self) -> None:
        function, *args = self.posted.get(timeout=10)
        function(*args)


def test_what_is_executed_at_a_reload_is_what_was_proven_last(tmp_path, monkeypatch, caplog):
    file = tmp_path / "link.yml"
    file.write_text(text := f"interface: eth0\nstate_dir: {tmp_path / 'a'}\n")
    one = Reloaded(monkeypatch, file, 0, 0, 2, 0)
    one.upgrade.ask()
    one.begun.get(timeout=10)
    for _ in range(20):
        one.upgrade.ask()  # while one is proven
    assert one.begun.empty(), "one at a time"
    one.goes.set()
    one.turn(), one.begun.get(timeout=10)
    assert not one.agent.execute, "asked for again: proven again"
    file.write_text(text + "max_ips: 5\n")
    one.turn(), one.begun.get(timeout=10)
    assert not one.agent.execute, "it has changed since it was read"
    one.turn()
    assert not one.agent.execute and "exit code 2" in caplog.text and one.begun.empty()
    one.upgrade.ask()
    one.turn()
    assert one.agent.execute


def test_a_reload_for_an_interface_or_state_directory_that_another_agent_has_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(link, "RUN", tmp_path / "run")
    file = tmp_path / "link.yml"
    file.write_text(f"interface: eth0\nstate_dir: {tmp_path / 'a'}\n")
    one = Reloaded(monkeypatch, file, 0, 0)
    one.goes.set()
    own, other = link.lock(one.agent.config), link.lock(config_of(tmp_path / "b", interface="eth1"))
    file.write_text(f"interface: eth1\nstate_dir: {tmp_path / 'a'}\n")
    one.upgrade.ask()
    one.turn()
    assert not one.agent.execute and "another agent has that interface or state_dir" in caplog.text
    for held in other:
        os.close(held or 0)
    one.upgrade.ask()
    one.turn()
    assert one.agent.execute
    for held in (*own, *link.lock(config_of(tmp_path / "b", interface="eth1"))):  # the trial has let go
        os.close(held or 0)


def test_a_reload_for_an_interface_that_cannot_serve_is_refused_where_the_present_one_can(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(link, "RUN", tmp_path / "run")
    now = {"eth0": "", "eth1": "eth1 does not exist: name another interface, or make it"}
    monkeypatch.setattr(
        link, "Network", lambda name: SimpleNamespace(sync=lambda listen: [link.Link(trouble=now[name])])
    )
    file = tmp_path / "link.yml"
    file.write_text(f"interface: eth0\nstate_dir: {tmp_path / 'a'}\n")
    one = Reloaded(monkeypatch, file, 0, 0, 0)
    one.goes.set()
    file.write_text(f"interface: eth1\nstate_dir: {tmp_path / 'a'}\n")
    one.agent.kernel = SimpleNamespace(link=link.Link(trouble=""))
    one.upgrade.ask()
    one.turn()
    assert not one.agent.execute and now["eth1"] in caplog.text
    one.agent.kernel = SimpleNamespace(link=link.Link(trouble="eth0 has no carrier"))
    one.upgrade.ask()
    one.turn()
    assert one.agent.execute, "nothing is lost by it"


def test_a_reload_to_a_program_that_ends_well_and_has_checked_nothing_is_refused(tmp_path, monkeypatch, caplog):
    """As one that was cut off while it was copied."""
    file = tmp_path / "link.yml"
    file.write_text("interface: eth0\n")
    one = Reloaded(monkeypatch, file, -1)
    one.goes.set()
    one.upgrade.ask()
    one.turn()
    assert not one.agent.execute and "it is no whole program" in caplog.text


def test_a_reload_for_which_no_thread_is_to_be_had_is_refused_and_the_next_one_is_not(tmp_path, monkeypatch, caplog):
    file = tmp_path / "link.yml"
    file.write_text("interface: eth0\n")
    one = Reloaded(monkeypatch, file, 0)
    one.goes.set()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        one.upgrade.ask()
    assert not one.agent.execute and "can't start new thread" in caplog.text
    one.upgrade.ask()
    one.turn()
    assert one.agent.execute


def test_a_reload_whose_proof_hangs_is_refused_with_that_reason(tmp_path, monkeypatch, caplog):
    file = tmp_path / "link.yml"
    file.write_text("interface: eth0\n")
    one = Reloaded(monkeypatch, file)
    monkeypatch.setattr(subprocess, "run", mock.Mock(side_effect=subprocess.TimeoutExpired("link.py", 30)))
    one.upgrade.ask()
    one.turn()
    assert not one.agent.execute and "timed out after 30 seconds" in caplog.text


def test_a_reload_that_would_lose_ips_that_were_added_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(link, "RUN", tmp_path / "run")
    monkeypatch.setattr(link, "Network", lambda name: SimpleNamespace(sync=lambda listen: [link.Link(trouble="")]))
    file, kept, new = tmp_path / "link.yml", "10.0.0.21", tmp_path / "new"
    text = "interface: eth0\nstate_dir: {}\n{}\n"
    file.write_text(text.format(tmp_path, "ips: [{ip: 10.0.0.10}]"))
    one, agent = Reloaded(monkeypatch, file, *[0] * 5), ByHand(tmp_path, ips=[{"ip": VIP}]).agent
    one.goes.set()
    agent.store.save_ip(kept, vip := link.VirtualIP(ipaddress.ip_interface(kept))).result()
    agent._manage(vip)
    one.agent.store, one.agent.vips, one.agent.kernel = agent.store, agent.vips, agent.kernel

    def reloads(where: Path, ips: str) -> bool:
        file.write_text(text.format(where, ips))
        one.agent.execute = None
        one.upgrade.ask()
        one.turn()
        return bool(one.agent.execute)

    assert reloads(tmp_path, ""), "what was configured may go"
    assert not reloads(new, "ips: [{ip: 10.0.0.10}]") and f"{new} has not {kept}: take its ips.* along" in caplog.text
    assert reloads(new, f"ips: [{{ip: {kept}}}]"), "it is configured now"
    agent.vips[kept].intent = link.Intent.DELETE
    assert reloads(new, "")
    one.agent.store = SimpleNamespace(found=mock.Mock(side_effect=PermissionError(13, "Permission denied", str(new))))
    assert not reloads(new, "") and f"Permission denied: '{new}'" in caplog.text


def test_a_reload_looks_at_another_interface_and_not_at_the_one_that_is_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(link, "RUN", tmp_path / "run")
    sync = mock.Mock(return_value=[link.Link(trouble="eth7 has no carrier")])
    monkeypatch.setattr(link, "Network", lambda name: SimpleNamespace(sync=sync))
    file, agent = tmp_path / "link.yml", ByHand(tmp_path).agent
    file.write_text(f"interface: eth0\nstate_dir: {tmp_path}\n")
    one = Reloaded(monkeypatch, file, *[0] * 4)
    one.goes.set()
    one.agent.store, one.agent.kernel = agent.store, agent.kernel

    def reloads(used: str) -> bool:
        one.agent.execute, one.agent.network = None, SimpleNamespace(name=used)
        one.upgrade.ask()
        one.turn()
        return bool(one.agent.execute)

    assert reloads("eth0") and not sync.called, "its cable may be out just now"
    assert not reloads("lan0") and "eth7 has no carrier" in caplog.text
    sync.side_effect = BlockingIOError(11, "Resource temporarily unavailable")
    assert reloads("lan0"), "what cannot be known is no reason"


@table("orders, rounds", [(0, 0), (3, 3), (1000, 60)])
def test_a_reload_waits_for_orders_under_way_but_not_for_ever(tmp_path, orders, rounds):
    left, posted, now = iter(range(orders)), queue.SimpleQueue[Any](), itertools.count(0, 0.05)
    config = config_of(tmp_path)
    agent = SimpleNamespace(clock=SimpleNamespace(now=lambda: 0.0), stopping=None, execute=None, config=config)
    agent.loop = SimpleNamespace(post=lambda *call: posted.put(call))
    agent.busy = lambda: next(left, None) is not None
    refused: list[str] = []
    agent.refuse = refused.append
    link.Upgrade(agent, ["--interface", "eth0"], {}).ask()
    for count in itertools.count():
        function, *args = posted.get(timeout=20)
        agent.clock.now = functools.partial(next, now) if count else agent.clock.now
        function(*args)
        if agent.execute:
            break
    assert rounds * 0.4 <= count <= rounds * 1.1 and bool(refused) is (orders == 1000)


def test_at_a_reload_an_order_that_is_not_done_in_time_is_answered_503_with_the_remedy(tmp_path, monkeypatch):
    answers = list[Future[Any]]()
    with Served(tmp_path, "node2", **WITH_ZOOKEEPER) as host, ThreadPoolExecutor(1) as client:

        def order_and_prove(*_: object, **__: object) -> SimpleNamespace:
            answers.append(client.submit(host.ask, "POST", f"{MINE}/lock"))
            until(host.agent.busy)
            return SimpleNamespace(returncode=0, stdout=link.CHECKED)

        host.wait("STANDBY", "node2", "node1")
        host.agent.loop.post(lambda: vars(host.agent.referee).update(obeys=False))
        monkeypatch.setattr(subprocess, "run", order_and_prove)
        host.agent.loop.post(link.Upgrade(host.agent, [], host.server.clients).ask)
        host.loop.join(5)
        status, body, _ = answers[0].result(5)
        assert (status, body["error"]) == (503, "restarting") and "ask again" in body["detail"]
        assert host.agent.execute and not host.loop.is_alive()


def test_an_ip_that_is_added_while_the_agent_stops_is_kept_and_not_bound(tmp_path):
    one = ByHand(tmp_path)
    added = one.agent.loop.ask(one.agent.add_ip, {"ip": VIP})
    until(lambda: one.run(0.01) or one.agent.loop.changes)
    one.agent.stop()
    until(lambda: one.run(0.01) or added.done())
    assert added.result()["status"] == "STANDBY" and not one.network.did("add")
    assert [vip.address for vip in stored(tmp_path)] == ["10.0.0.10"]


def test_the_macs_of_hosts_that_are_gone_for_good_are_forgotten_in_the_end(tmp_path):
    one = ByHand(tmp_path, zookeeper="z:2181")
    for number in range(600):
        hosts = ["node1", *(f"host{n}" for n in range(max(0, number - 2), number + 1))]
        one.agent.referee.records = {host: link.Record(f"02:00:00:00:{number % 256:02x}:01", (), "") for host in hosts}
        one.agent.referee_news("")
    assert [*one.agent.macs] == [f"host{n}" for n in range(600 - 3 - link.HOSTS, 600)]


def test_a_blocked_stderr_stops_nobody_and_what_was_lost_is_counted(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe, open(reading, encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stderr", pipe)
        old = logging.root.handlers[:]
        try:
            handler = link.set_up_logging(config_of(tmp_path))
            began = time.monotonic()
            for number in range(14000):
                link.log.info("%d %s", number, "x" * 100)
                if number == 2000:
                    handler.drain(0.2)  # the pipe is full from here on
            assert time.monotonic() - began < 5 and handler.lost
            lines = itertools.islice(out, 5000)
            assert " INFO 0 x" in next(lines) and len([*lines]) == 4999
            link.log.info("again")
            assert "lines before this one were lost" in next(line for line in out if "again" in line)
        finally:
            logging.basicConfig(handlers=old, level=logging.WARNING, force=True)
            link.log.setLevel(logging.NOTSET)


def test_version_and_help_name_everything_and_no_secret_is_a_flag(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stopped:
            link.load([flag])
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"LinK {link.VERSION}\n") and "fault      elected    demoted" in text
    for option in link.OPTIONS:
        flag = "--" + option.name.replace("_", "-")
        assert (f"{flag} VALUE" in text) if option.metadata["flag"] else (option.name in text and flag not in text)
        assert not (option.metadata["flag"] and option.name in ("password", "zookeeper_auth"))


def test_the_readme_lists_every_key_with_its_default_and_meaning():
    rows = readme_table("| key | default | meaning |")
    assert [row[0] for row in rows] == [option.name for option in link.OPTIONS]
    for (key, shown, meaning), option in zip(rows, link.OPTIONS, strict=True):
        default = option.default_factory()
        assert (yaml.safe_load(shown) or type(default)()) == default, key
        assert meaning.replace("\\|", "|") == re.sub(r"[`*]", "", option.metadata["help"]), key


# == Frames ====================================================================

FRAMES = {  # Ethernet: to, from, type; then
    # ARP: Ethernet, IPv4; request; sender MAC and IP, target MAC and IP
    "request": "ffffffffffff 020000000a01 0806 0001 0800 06 04 0001 020000000a01 0a00000a 000000000000 0a00000a",
    # ARP reply; the target MAC is our own: with Linux that overrides young entries, too
    "reply": "ffffffffffff 020000000a01 0806 0001 0800 06 04 0002 020000000a01 0a00000a 020000000a01 0a00000a",
    # ARP request whose sender IP is 0.0.0.0 (RFC 5227, 2.1.1)
    "probe": "ffffffffffff 020000000a01 0806 0001 0800 06 04 0001 020000000a01 00000000 000000000000 0a00000a",
    # IPv6, hop limit 255, to all nodes; NA, checksum, Override; target; option 2: target link-layer address
    "NA": "333300000001 020000000a01 86dd 60000000 0020 3a ff fd770000000000000000000000000100"
    " ff020000000000000000000000000001 8800 4daf 20000000 fd770000000000000000000000000100 02 01 020000000a01",
    # from our link-local address to the solicited-node group; NS; option 1: source link-layer address
    "NS to all": "3333ff000100 020000000a01 86dd 60000000 0020 3a ff fe800000000000000000000000000001"
    " ff0200000000000000000001ff000100 8700 6fa4 00000000 fd770000000000000000000000000100 01 01 020000000a01",
    "NS to one": "3333ff000100 020000000a01 86dd 60000000 0020 3a ff fe800000000000000000000000000001"
    " fd770000000000000000000000000100 8700 7031 00000000 fd770000000000000000000000000100 01 01 020000000a01",
    # without an address of our own from the unspecified one, and then without the option (RFC 4861, 4.3)
    "anonymous NS": "3333ff000100 020000000a01 86dd 60000000 0018 3a ff 00000000000000000000000000000000"
    " ff0200000000000000000001ff000100 8700 7b30 00000000 fd770000000000000000000000000100",
    # LinK's own words, frozen: ARP opcode 24 or 25 (RFC 5494), the target MAC is "LnK", version 1
    "WANT": "020000000b02 020000000a01 0806 0001 0800 06 04 0018 020000000a01 00000000 4c6e4b010000 0a00000a",
    "GIVE": "020000000b02 020000000a01 0806 0001 0800 06 04 0019 020000000a01 00000000 4c6e4b010000 0a00000a",
    # NS to the solicited-node group with option 253 (RFC 4727) behind the others: "LnK", version 1, 24 or 25, 0
    "ND WANT": "020000000b02 020000000a01 86dd 60000000 0028 3a ff fe800000000000000000000000000001"
    " ff0200000000000000000001ff000100 8700 c32a 00000000 fd770000000000000000000000000100 01 01 020000000a01"
    " fd 01 4c6e4b 01 18 00",
    "ND GIVE": "020000000b02 020000000a01 86dd 60000000 0028 3a ff fe800000000000000000000000000001"
    " ff0200000000000000000001ff000100 8700 c22a 00000000 fd770000000000000000000000000100 01 01 020000000a01"
    " fd 01 4c6e4b 01 19 00",
    "anonymous GIVE": "020000000b02 020000000a01 86dd 60000000 0020 3a ff 00000000000000000000000000000000"
    " ff0200000000000000000001ff000100 8700 cdb6 00000000 fd770000000000000000000000000100 fd 01 4c6e4b 01 19 00",
}
HEX = {name: bytes.fromhex(text) for name, text in FRAMES.items()}


TO, EVERYBODY = bytes.fromhex("020000000b02"), b"\xff" * 6


@table("address, own, names, words", [
    ("10.0.0.10", {4: "10.0.0.1"}, ["request", "reply", "probe", "probe"], ["WANT", "GIVE"]),
    ("fd77::100", {6: "fe80::1"}, ["NA", "NS to all", "NS to one"], ["ND WANT", "ND GIVE"]),
    ("fd77::100", {}, ["NA", "anonymous NS", "anonymous NS"], [None, "anonymous GIVE"]),
])  # fmt: skip
def test_frames_are_right_byte_for_byte(address, own, names, words):
    frames, ip = link.Frames(MAC, own), ipaddress.ip_address(address)
    one = frames.ask(ip, TO)
    assert one[:6] == TO
    assert [*frames.announce(ip), frames.ask(ip), HEX[names[-1]][:6] + one[6:]] == [HEX[name] for name in names]
    got = [frames.ask(ip, TO, kind) for kind in (link.Kind.WANT, link.Kind.GIVE)]
    assert [frame for frame, name in zip(got, words, strict=True) if name] == [HEX[name] for name in words if name]


def test_any_address_is_patched_in_as_scapy_would_write_it():
    from scapy.layers import l2

    dice = random.Random(1)
    made = [
        link.Frames(dice.randbytes(6), own) for own in ({6: "fe80::1"}, {6: f"fe80::{dice.randrange(1 << 16):x}"}, {})
    ]
    edges = [0, 1, 0xFFFF, 0xFFFFFFFF, (1 << 128) - 1, (1 << 128) - 2, 0xFFFF << 112, 0xFFFE, 0xFF << 24]
    for number in (*edges, *(dice.randrange(1 << 128) >> dice.randrange(0, 120, 8) for _ in range(150))):
        for ip in (ipaddress.IPv6Address(number), ipaddress.IPv4Address(number & 0xFFFFFFFF)):
            frames = dice.choice(made)
            words = [frames.ask(ip, TO, kind) for kind in (link.Kind.WANT, link.Kind.GIVE)]
            for frame in (*frames.announce(ip), frames.ask(ip), frames.ask(ip, TO), *words):
                packet = l2.Ether(frame)
                assert ip.packed in frame and str(ip) in (packet.lastlayer().fields.get("pdst", str(ip)),)
                for layer in packet.layers():
                    packet[layer].fields.pop("cksum", None)
                assert bytes(packet) == frame


ARP, NS = {"hwsrc": "02:00:00:00:0a:01", "pdst": "10.0.0.10"}, {"tgt": "fd77::100", "hlim": 255}
MEANT: dict[str, dict[str, Any]] = {
    "request": {**ARP, "op": 1, "psrc": "10.0.0.10"}, "reply": {**ARP, "op": 2, "psrc": "10.0.0.10"},
    "probe": {**ARP, "op": 1, "psrc": "0.0.0.0"}, "NA": {**NS, "R": 0, "S": 0, "O": 1, "lladdr": "02:00:00:00:0a:01"},
    "NS to all": {**NS, "lladdr": "02:00:00:00:0a:01"}, "NS to one": NS, "anonymous NS": NS,
    "WANT": {**ARP, "op": 24, "psrc": "0.0.0.0"}, "GIVE": {**ARP, "op": 25, "psrc": "0.0.0.0"},
    "ND WANT": {**NS, "type": 253, "len": 1}, "ND GIVE": {**NS, "type": 253, "len": 1},
    "anonymous GIVE": {**NS, "type": 253, "len": 1},
}  # fmt: skip


@table("name", HEX)
def test_scapy_reads_the_frames_as_they_are_meant_with_the_right_checksum(name):
    from scapy.layers import l2

    packet = l2.Ether(HEX[name])
    fields = {key: value for layer in packet.layers() for key, value in packet[layer].fields.items()}
    assert MEANT[name].items() <= fields.items()
    for layer in packet.layers():
        if "cksum" in packet[layer].fields:
            packet[layer].delfieldval("cksum")  # is computed anew
    assert bytes(packet) == HEX[name]


def from_other(name: str, at: int = 0, new: bytes = b"", to: bytes = b"") -> bytes:
    """One of the frames above as another host sends it, perhaps with other bytes in one place."""
    frame = HEX[name].replace(MAC, OTHER_MAC)
    frame = frame[:at] + new + frame[at + len(new) :]
    return to + frame[len(to) :]


@table("frame, address, kind, broadcast", [
    (from_other("request"), "10.0.0.10", CLAIM, True),
    (from_other("request", 38, b"\x0a\0\0\x63"), "10.0.0.10", CLAIM, True),  # asks for another address
    (from_other("reply"), "10.0.0.10", CLAIM, True),
    (from_other("reply", 38, bytes(4), to=MAC), "10.0.0.10", CLAIM, False),
    (from_other("probe"), "10.0.0.10", ASK, True),
    (from_other("probe", to=MAC) + bytes(18), "10.0.0.10", ASK, False),  # padded to 60 bytes
    (from_other("NA"), "fd77::100", CLAIM, True),
    (from_other("NA", to=MAC), "fd77::100", CLAIM, False),
    (from_other("NS to all"), "fd77::100", ASK, True),
    (from_other("anonymous NS"), "fd77::100", ASK, True),
    (from_other("WANT", to=MAC), "10.0.0.10", WANT, False),
    (from_other("GIVE", to=EVERYBODY) + bytes(18), "10.0.0.10", GIVE, True),
    (from_other("ND WANT", to=MAC) + bytes(4), "fd77::100", WANT, False),
    (from_other("ND GIVE", to=EVERYBODY), "fd77::100", GIVE, True),
    (from_other("anonymous GIVE", to=MAC), "fd77::100", GIVE, False),
    (from_other("ND GIVE", 88, b"XnK", to=MAC), "fd77::100", ASK, False),  # another one's experiment
])  # fmt: skip
def test_a_frame_tells_who_has_or_asks_for_an_address(frame, address, kind, broadcast):
    assert link.read_frame(frame) == (address, OTHER_MAC, kind, broadcast)


NOTHING = {
    "empty": b"", "cut off": HEX["probe"][:-1], "a reply from 0.0.0.0": from_other("probe", 20, b"\0\2"),
    "not Ethernet": from_other("probe", 14, b"\0\6"), "IPv4": from_other("probe", 12, b"\x08\0"),
    "a VLAN": from_other("probe", 12, b"\x81\0"), "cut off NA": HEX["NA"][:77], "UDP": from_other("NA", 20, b"\x11"),
    "an echo": from_other("NA", 54, b"\x80"), "through a router (RFC 4861, 7.1)": from_other("NA", 21, b"\xfe"),
    "shorter than it is (RFC 4861, 7.1)": from_other("NA", 18, b"\0\x17"),
    "ARP of another MAC than it comes from": from_other("reply", 6, MAC), "opcode 26": from_other("GIVE", 21, b"\x1a"),
    "another experiment": from_other("WANT", 32, b"X"), "a later version": from_other("WANT", 35, b"\2"),
    "a later version, ND": from_other("ND WANT", 91, b"\2"), "a later word, ND": from_other("ND WANT", 92, b"\x1a"),
    "what a proxy answers to an announcement": from_other("reply", to=MAC),
    "a word with a sender's address": from_other("GIVE", 28, b"\x0a"), "a cut off word": from_other("ND WANT")[:-1],
}  # fmt: skip


def test_any_other_frame_is_nothing_and_none_makes_the_reader_fail():
    assert [what for what, frame in NOTHING.items() if link.read_frame(frame)] == []
    dice = random.Random(1)
    for _ in range(5000):
        frame = bytearray(dice.choice([*HEX.values(), dice.randbytes(dice.randrange(1, 200))]))
        for _ in range(dice.randrange(6)):
            frame[dice.randrange(len(frame))] = dice.randrange(256)
        heard = link.read_frame(bytes(frame[: dice.randrange(len(frame) + 1)]))
        assert heard is None or (ipaddress.ip_address(heard.address) and len(heard.mac) == 6)


# == State directory ===========================================================


def store_in(state_dir: Path, **more: Any) -> link.Store:
    return link.Store(config_of(state_dir, **more))


def some_vips(count: int) -> list[VirtualIP]:
    return [VirtualIP(link.parse_address(f"10.1.{n // 250}.{n % 250 + 1}"), (), 5, f"vip-{n}") for n in range(count)]


def stored(state_dir: Path) -> list[VirtualIP]:
    return store_in(state_dir).load_ips()


def test_ips_are_kept_privately_and_without_left_overs(tmp_path):
    store, vips = store_in(tmp_path), some_vips(3)
    assert store.load_ips() == []
    for vip in vips:
        store.save_ip(vip.address, vip).result(5)
        assert stored(tmp_path)[-1] == vip  # on disk when the future is done
    assert store.save_session({"states": {}}, now=True)
    store.save_ip(vips[1].address, None)
    store.save_ip(vips[0].address, changed := VirtualIP(vips[0].ip, (), 9, vips[0].id)).result(5)
    assert stored(tmp_path) == [vips[2], changed]
    assert {(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        ("ips.json", 0o600), ("ips.journal", 0o600), ("session.json", 0o600),
    }  # fmt: skip


def test_a_thousand_ips_are_added_and_removed_in_seconds_and_the_journal_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "JOURNAL", 300)
    store, vips, began = store_in(tmp_path), some_vips(1000), time.monotonic()
    for vip in vips:
        store.save_ip(vip.address, vip).result(5)
    assert time.monotonic() - began < 30
    assert stored(tmp_path) == vips and (tmp_path / "ips.journal").read_bytes().count(b"\n") <= 300
    for vip in vips[1:]:
        store.save_ip(vip.address, None).result(5)
    assert stored(tmp_path) == vips[:1]


WRITER = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import link
from test_link import Path, some_vips, store_in
link.JOURNAL = 3
store, vips = store_in(Path(sys.argv[2])), some_vips(500)
for vip in [] if store.load_ips() else vips: store.save_ip(vip.address, vip).result()
print(flush=True)
while True:
    store.save_ip(vips[7].address, None).result(); store.save_ip(vips[7].address, vips[7]).result()
"""


def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path):
    dice, seven = random.Random(2), some_vips(500)[7]
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(HERE), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout and child.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(dice.random() * 0.2)
            child.kill()
        left = stored(tmp_path)
        assert len(left) == 499 + (seven in left) and not [*tmp_path.glob("*.corrupt-*")]


LINE = b'["10.0.0.11", {"ip": "10.0.0.11"}]\n'


JOURNALS = {LINE[:-1]: [], LINE + LINE[:9]: ["10.0.0.11"], LINE + b'["10.0.0.11", null]\n': [], LINE * 2: ["10.0.0.11"]}


@table("journal, kept", JOURNALS.items())
def test_a_line_counts_once_it_is_whole_and_may_be_read_twice(tmp_path, caplog, journal, kept):
    (tmp_path / "ips.journal").write_bytes(journal)
    store = store_in(tmp_path)
    assert [vip.address for vip in store.load_ips()] == kept
    store.save_ip(ADDRESS, VirtualIP(link.parse_address(VIP))).result(5)
    assert [vip.address for vip in stored(tmp_path)] == [*kept, "10.0.0.10"] and not caplog.text


def test_an_entry_that_this_version_cannot_parse_stays_in_the_file_is_named_and_the_others_are_served(tmp_path, caplog):
    newer = {"ip": "10.0.0.12", "colour": "red"}
    (tmp_path / "ips.json").write_text(json.dumps({"ips": [newer, {"ip": VIP}, {"ip": "10.0.0.10/24"}, "x"]}))
    (tmp_path / "ips.journal").write_text(json.dumps(["10.0.0.13", {"ip": "10.0.0.13", "shape": 1}]) + "\n")
    with open(tmp_path / "ips.journal", "ab") as journal:
        journal.write(b'[5\n["10.0.0.14", {"ip": "10.0.0.14"}]\n')
    for _ in range(2):
        store = store_in(tmp_path)
        assert [str(vip.ip) for vip in store.load_ips()] == [VIP, "10.0.0.14/32"]  # of two the first
        assert {record.levelname for record in caplog.records} == {"ERROR"} and "'colour'" in caplog.text
        store.save_ip("10.0.0.99", None).result(5)
    kept = json.loads((tmp_path / "ips.json").read_bytes())["ips"]
    assert newer in kept and "x" in kept and {"ip": "10.0.0.13", "shape": 1} in kept and "[5" in kept and len(kept) == 6


def test_what_could_not_be_made_to_last_has_not_happened_also_after_a_restart(tmp_path, monkeypatch):
    store, vips = store_in(tmp_path), some_vips(3)
    store.save_ip(vips[0].address, vips[0]).result(5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        for change in (lambda: store.save_ip(vips[1].address, vips[1]), lambda: store.save_ip(vips[0].address, None)):
            with pytest.raises(link.LinkError, match="state directory"):
                change().result(5)
            assert stored(tmp_path) == vips[:1]
    store.save_ip(vips[2].address, vips[2]).result(5)
    assert stored(tmp_path) == [vips[0], vips[2]]


CORRUPT = [b"", b"\xff\xfe", b"[]", b"[" * 100000, b'{"ips": [{"ip": "10.0', b'{"ips": null}', b'{"ips": 5}']


@table("content", CORRUPT)
def test_a_corrupt_file_is_set_aside_whole_with_an_error_and_a_second_one_beside_it(tmp_path, caplog, content):
    (tmp_path / "ips.json").write_bytes(content)
    assert stored(tmp_path) == []
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("ips.json.corrupt-") and aside.read_bytes() == content
    assert [record.levelname for record in caplog.records] == ["ERROR"] and str(aside) in caplog.text
    (tmp_path / "ips.json").write_bytes(b"two")
    assert stored(tmp_path) == []
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == sorted([content, b"two"])


def test_an_error_of_reading_is_raised_and_without_a_directory_only_writing_what_must_last_fails(tmp_path, caplog):
    (tmp_path / "ips.json").mkdir()
    with pytest.raises(IsADirectoryError):
        stored(tmp_path)
    (tmp_path / "ips.json").rmdir()  # nothing was renamed
    (tmp_path / "file").write_text("")  # also root cannot write below a regular file
    for directory in (tmp_path / "file" / "state", tmp_path / "absent"):
        store = store_in(directory)
        assert (store.load_ips(), store.load_session()) == ([], {})
        for _ in range(2):
            assert not store.save_session({}, now=True) and str(directory) in store.trouble
        with pytest.raises(link.LinkError) as error:
            store.save_ip(some_vips(1)[0].address, some_vips(1)[0]).result(5)
        assert error.value.status == 503 and str(directory) in error.value.body["detail"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
        caplog.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_session_goes_not_along_into_another_network_namespace_of_the_same_boot(tmp_path, monkeypatch):
    store_in(tmp_path).save_session({"session": [1, "ab"]}, now=True)
    boot, namespace = link.boot_id().split(".")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "session.json", tmp_path / "copy")
    monkeypatch.setattr(link, "boot_id", lambda: f"{boot}.{int(namespace) + 1}")
    assert store_in(tmp_path / "copy").load_session() == {}
    content = {"identity": ["node1", boot], "session": [1, "ab"]}  # of an earlier version, which knew no namespace
    (tmp_path / "session.json").write_text(json.dumps(content))
    assert store_in(tmp_path).load_session()["session"] == [1, "ab"]


@table("other, same", [({}, 1), ({"interface": "eth1"}, 1), ({"zookeeper": "y:1"}, 1), ({"hostname": "node2"}, 0)])
def test_a_session_is_adopted_by_the_same_host_in_the_same_boot_also_of_an_earlier_version(
    tmp_path, monkeypatch, other, same
):
    for more in ([], ["02:00:00:00:0a:01", "z:1", "/link", "eth0"]):
        content = {"identity": ["node1", link.boot_id(), *more], "session": [1, "ab"]}
        (tmp_path / "session.json").write_text(json.dumps(content))
        assert store_in(tmp_path, **other).load_session().get("session") == ([1, "ab"] if same else None)
    store_in(tmp_path).save_session({"session": [1, "ab"]}, now=True)
    assert store_in(tmp_path, **other).load_session().get("session") == ([1, "ab"] if same else None)
    elsewhere = store_in(tmp_path, **{**other, "zookeeper": "z:1/elsewhere"}).load_session()
    assert not elsewhere.get("session"), "its nodes would stay where nobody looks for them any more"
    monkeypatch.setattr(link, "boot_id", lambda: "another boot")
    assert store_in(tmp_path).load_session() == {}


def test_a_stalled_disk_holds_up_no_caller_and_the_latest_session_is_written_soon(tmp_path, monkeypatch):
    store, stalled, write = store_in(tmp_path), threading.Event(), link.Store._write
    monkeypatch.setattr(link.Store, "_write", lambda *args, **more: stalled.wait(20) and write(*args, **more))
    began = time.monotonic()
    for number in range(100):
        store.save_session({"session": [number, "ab"]})
    assert time.monotonic() - began < 0.5 and not store.save_session({"session": [100, "ab"]}, now=True)
    assert 0.9 < time.monotonic() - began < 3
    stalled.set()
    until(lambda: store_in(tmp_path).load_session().get("session") == [100, "ab"], timeout=0.5)


WRONG_SESSIONS = [{"session": [1, "xy"]}, {"session": 5}, {"session": ["a", "ab"]}, {"states": {"10.0.0.10": "BUSY"}}]
WRONG_SESSIONS += [{"states": ["STANDBY"]}, {"hosts": 5}, {"macs": ["02:00:00:00:00:01"]}]
WRONG_SESSIONS += [{"states": {"all": "STANDBY"}}]
UNREADABLE = [b"", b"[]", b"5", b"{}", b'{"identity"', b"\xff", b'{"identity": null}', b"[" * 100000]


@table("content", WRONG_SESSIONS + UNREADABLE)
def test_a_session_that_is_unreadable_or_has_a_wrong_word_in_it_is_a_fresh_start(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "session.json").write_bytes(content)
    else:
        assert store_in(tmp_path).save_session(content, now=True)
    assert store_in(tmp_path).load_session() == {}


# == Health checks =============================================================


@contextlib.contextmanager
def service(answer: bytes | None, pieces: int = 1) -> Iterator[int]:
    """A port on which every connection gets this answer, 50 ms apart; None: is accepted and then left alone."""
    kept, end = [], threading.Event()

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                kept.append(server.accept()[0])
                if answer is not None:
                    kept[-1].recv(1000)
                    for _ in range(pieces):
                        kept[-1].sendall(answer)
                        end.wait(0.05 * (pieces > 1))
                    kept.pop().close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        end.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


OK_HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n\r\n"


@table("kind, answer, reason", [
    ("HTTP", b"H", "timed out"),  # a server that drips does not hold it beyond its timeout
    ("TCP", b"", ""), ("TCP", None, ""), ("HTTP", OK_HTTP, ""), ("HTTP", MOVED, ""), ("HTTP", b"", "HTTP"),
    ("HTTP", b"HTTP/1.1 404 Not Found\r\n\r\n", "404"), ("HTTP", b"HTTP/1.1 500 Oh\r\n\r\n", "500"),
    ("HTTP", b"220 smtp.example.org\r\n", "220 smtp"), ("HTTP", b"\x16\x03\x01\xff\xff\0\r\n\r\n", "HTTP"),
    ("HTTP", None, "timed out"), ("HTTP", b"\x1b[2J\r\xe9\n\r\n", r"\x1b[2J\r\xe9"),  # for the log, too
    ("HTTP", b"x" * 9000, "x" * 200),
])  # fmt: skip
def test_a_check_passes_or_says_why_not(kind, answer, reason):
    began = time.monotonic()
    with service(answer, 60 if answer == b"H" else 1) as port:
        got = link.run_check(HealthCheck(kind, "127.0.0.1", port, "/status?a=b"), 0.2)
        assert time.monotonic() - began < 1.4
    assert (reason in got and f"127.0.0.1:{port}" in got and len(got) < 240) if reason else got == ""
    assert got.isascii() and got.isprintable()


@table("kind", ["TCP", "HTTP"])
def test_a_refused_or_hanging_connection_and_an_impossible_name_are_failures(kind):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # fills the backlog: the next SYN is not answered
            assert "timed out" in link.run_check(HealthCheck(kind, "127.0.0.1", port), 0.2)
    assert "refused" in link.run_check(HealthCheck(kind, "127.0.0.1", port), 0.2)
    assert link.run_check(HealthCheck(kind, "a..b", 80), 0.2)


# == Agent: with a network and a ZooKeeper of make-believe =====================


@table("fake, real", [(FakeNetwork, link.Network), (FakeReferee, link.Referee), (link.NoReferee, link.Referee)])
def test_make_believe_has_every_method_of_the_real_thing(fake, real):
    for name, function in inspect.getmembers(real, inspect.isfunction):
        if not name.startswith("_") and (fake is not link.NoReferee or not hasattr(fake, name)):
            mine = inspect.signature(getattr(fake, name))
            assert [*mine.parameters] == [*inspect.signature(function).parameters], name


ONE = {"ips": [{"ip": VIP}]}
WITH_ZOOKEEPER = {**ONE, "zookeeper": "zk:2181"}
ONE_CHECKED = {"ips": [{"ip": VIP, "checks": [RIGHT_CHECK], "healthcheck_interval": 1}]}


def test_an_address_is_bound_announced_bound_again_if_removed_and_at_a_delete_unbound_and_announced_no_more(tmp_path):
    one = ByHand(tmp_path, zookeeper="zk:2181")
    one.call(one.agent.add_ip, {"ip": VIP})
    one.run(20)
    assert one.network.did("add", "announce") == [f"add {VIP}"] + ["announce 10.0.0.10"] * 2 * 7
    one.network.done.clear()
    del one.network.kernel[ipaddress.ip_interface(VIP)]  # by hand
    one.run(1.0)
    assert one.network.done[:2] == [f"add {VIP}", "announce 10.0.0.10"]
    one.network.done.clear()
    one.call(one.agent.delete_ip, "10.0.0.10")
    one.run(80)
    assert one.network.done == [f"remove {VIP}"]


def test_at_start_bound_addresses_stay_strays_of_ours_go_and_foreign_ones_are_left_alone(tmp_path):
    network, stray = FakeNetwork(), ipaddress.ip_interface("10.0.0.11/32")
    network.kernel |= {ipaddress.ip_interface(VIP): True, stray: True}
    before = set(network.kernel)
    ByHand(tmp_path, network, **ONE).run(2)
    assert network.did("add", "remove") == [f"remove {stray}", f"add {VIP}"]  # for ever, if it was not
    assert before - set(network.kernel) == {stray}


@table("age, renewed", [(1.3, 1), (1.5, 0)])
def test_with_at_most_one_the_next_program_has_an_address_for_its_whole_lifetime_if_the_session_lives_longer(
    tmp_path, monkeypatch, age, renewed
):
    one = ByHand(tmp_path, **WITH_ZOOKEEPER, promise="at-most-one")
    one.run(2)
    before = len(one.network.did("add"))
    assert one.ip()["bound"] and one.agent.lifetime == 2  # s, and 0.6 s of slack, of a session of 4 s
    monkeypatch.setattr(one.agent.referee, "age", lambda now: age)
    one.agent.execute = lambda: None
    assert one.agent.turn(math.inf) and len(one.network.did("add")) - before == renewed


def test_a_configured_ip_that_the_host_has_for_itself_is_failing_and_left_alone(tmp_path):
    network, own = FakeNetwork(), ipaddress.ip_interface(VIP)
    network.kernel[own] = False
    one = ByHand(tmp_path, network, **ONE)
    one.run(5)
    assert one.ip()["status"] == "FAILING" and "for itself" in one.ip()["reason"] and not one.ip()["bound"]
    assert not network.did("add", "remove", "announce")
    del network.kernel[own]
    one.run(3)
    assert (one.ip()["status"], one.ip()["bound"]) == ("ACTIVATED", True)


def test_an_address_that_cannot_be_bound_makes_the_ip_failing_until_it_can(tmp_path):
    network = FakeNetwork()
    network.broken = OSError(errno.ENOBUFS, "No buffer space available")
    one = ByHand(tmp_path, network, **ONE)
    one.run(0.5)
    assert one.ip()["status"] == "FAILING" and "No buffer space" in one.ip()["reason"]
    network.broken = None
    one.run(5)
    assert (one.ip()["status"], one.ip()["bound"]) == ("ACTIVATED", True)


@table("answers", [True, False])
def test_without_zookeeper_an_address_is_taken_only_if_nobody_answers_for_it(tmp_path, answers):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **ONE)
    for _ in range(30):
        one.network.incoming.append(link.Heard("10.0.0.10" if answers else "10.0.0.2", OTHER_MAC, CLAIM, False))
        one.run(0.05)
    assert one.network.did("ask")
    assert one.network.did("add", "announce")[:2] == ([] if answers else [f"add {VIP}", "announce 10.0.0.10"])


FALL_RISE = [(1, 1, "+-+-", "AFAF"), (3, 1, "--+--+---+", "FFAAAAAAFA"), (2, 3, "+++-+--++-+++", "FFAAAAFFFFFFA")]


@table("fall, rise, results, states", FALL_RISE)
def test_fall_failures_in_a_row_fail_an_ip_and_rise_passes_in_a_row_end_that(tmp_path, fall, rise, results, states):
    to_come, seen = iter(results), ""
    config = {**ONE_CHECKED, "health_check_fall": fall, "health_check_rise": rise}
    pool = AtOnce(check=lambda *_: "" if next(to_come, "+") == "+" else "down")
    one = ByHand(tmp_path, pool=pool, **config)
    for _ in results:
        one.run(0.02)
        seen += one.ip()["status"][0]
        one.run(1.2, pace=1.2)
    assert seen == states


def test_a_check_that_hangs_fails_and_is_not_run_twice_at_a_time(tmp_path):
    end, runs, pool = threading.Event(), [], link.Pool()

    def check(_: HealthCheck, timeout: float) -> str:
        runs.append(timeout)
        return "" if len(runs) == 1 or end.wait(20) else "late"

    pool.check = check
    one = ByHand(tmp_path, pool=pool, **ONE_CHECKED, health_check_timeout=0.5, health_check_fall=2)
    until(lambda: one.run(0.01) or one.ip()["status"] == "ACTIVATED")
    until(lambda: one.run(0.01) or len(runs) == 2)
    one.run(10)
    assert (one.ip()["status"], runs) == ("FAILING", [0.5, 0.5])
    end.set()


@table("hosts", [(), ("node2",)])
def test_a_check_that_cannot_begin_while_others_hang_leaves_the_verdict_in_doubt(tmp_path, hosts, caplog):
    """What is held is kept; what is not held is not asked for, until the check has passed again."""
    waiting, stuck = [], False

    def submit(work, *args):
        waiting.append((work, args)) if stuck else work(*args)

    pool = SimpleNamespace(submit=submit, check=lambda *_: "")
    config = {**WITH_ZOOKEEPER, **ONE_CHECKED, "health_check_timeout": 0.5}
    one = ByHand(tmp_path, pool=pool, **config)
    for host in hosts:
        one.agent.referee.queues.clear()
        one.agent.referee.enter(ADDRESS, host)
    one.run(3)
    assert one.ip()["status"] == ("STANDBY" if hosts else "ACTIVATED") and one.ip()["hosts"][-1] == "node1"
    stuck = True
    one.run(1.2)
    assert one.ip()["hosts"][-1] == "node1" and not one.agent.vips[ADDRESS].checks.unsure
    one.run(2)
    assert one.agent.vips[ADDRESS].checks.unsure and len(waiting) == 1
    one.run(60, pace=0.1)
    assert one.ip()["status"] == ("STANDBY" if hosts else "ACTIVATED")
    assert one.ip()["hosts"] == ([*hosts] or ["node1"]) and one.ip()["bound"] is not bool(hosts)
    assert caplog.text.count("cannot begin") == 1
    stuck = False
    for work, args in waiting:
        work(*args)
    one.run(1)
    assert one.ip()["hosts"][-1] == "node1" and not one.agent.vips[ADDRESS].checks.unsure


def test_an_ip_whose_check_can_never_begin_is_bound_as_the_last_resort_but_not_where_another_host_has_it(tmp_path):
    """The pool hangs in the checks of others, from the start."""
    for name, served in (("alone", False), ("served", True)):
        pool = SimpleNamespace(submit=lambda *_: None, check=None)
        (tmp_path / name).mkdir()
        one = ByHand(tmp_path / name, FakeNetwork(arp=True), pool, **ONE_CHECKED)
        for second in range(30):
            one.network.incoming += [link.Heard(ADDRESS, OTHER_MAC, CLAIM, True)] * served
            one.run(1, pace=0.05)
            assert one.ip()["bound"] is (not served and second > 4) or second in (4, 5, 6, 7)
        assert one.ip()["status"] == "FAILING" and "check cannot begin" in one.ip()["reason"]


def test_a_check_that_began_late_and_fails_is_counted(tmp_path):
    waiting = []
    pool = SimpleNamespace(submit=lambda work, *args: waiting.append((work, args)), check=lambda *_: "down")
    one = ByHand(tmp_path, pool=pool, **ONE_CHECKED, health_check_timeout=0.5, health_check_fall=1)
    one.run(5)
    (work, args) = waiting.pop()
    work(*args)
    one.run(0.02)
    assert "down" in one.ip()["reason"]


def test_no_silence_is_proven_while_frames_are_still_to_be_read(tmp_path):
    """The holder's answers come behind more frames than are read in a turn; so it goes on for ten turns."""
    one = ByHand(tmp_path, FakeNetwork(arp=True), **ONE)
    answer, other = (link.Heard(address, OTHER_MAC, CLAIM, False) for address in (ADDRESS, "10.0.0.77"))
    one.network.incoming.append(answer._replace(broadcast=True))
    for _ in range(200):
        one.network.incoming.append(answer)
        one.run(0.01)
    assert one.ip()["status"] == "STANDBY"
    one.network.incoming += [*[other] * 512 * 10, answer]
    one.run(0.7, pace=0.07)
    assert one.network.incoming and not one.ip()["bound"]
    one.run(0.02)
    assert one.ip()["status"] == "STANDBY"
    one.run(2)
    assert one.ip()["bound"]


def test_an_announcement_that_crossed_ours_is_answered_at_once_and_only_once(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    one.run(0.02)
    said = len(one.network.did("announce"))
    assert one.ip()["bound"] and said
    one.network.incoming.append(link.Heard(ADDRESS, OTHER_MAC, CLAIM, True))  # of who lets go for us
    one.run(0.02)
    assert len(one.network.did("announce")) > said
    for _ in range(90):
        one.network.incoming.append(link.Heard(ADDRESS, OTHER_MAC, CLAIM, True))
        one.run(0.01)
    assert len(one.network.did("announce")) <= 2 * 4


@table("other", [OTHER_MAC, b"\x02\0\0\0\0\x99"])
def test_a_host_that_goes_on_answering_for_an_ip_is_said_each_minute_by_name_and_is_one_conflict(
    tmp_path, caplog, other
):
    caplog.set_level("INFO")
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    one.run(2)
    for _ in range(190):
        one.network.incoming.append(link.Heard(ADDRESS, other, CLAIM, other is not OTHER_MAC))
        one.run(1, pace=0.05)
    said = [record for record in caplog.records if "also answered for by" in record.message]
    assert len(said) == 4 and one.ip()["conflicts"] == {"count": 1, "mac": other.hex(":")}
    who = "node2, another contender" if other is OTHER_MAC else "a foreign host"
    assert all(f"{other.hex(':')} ({who})" in record.message for record in said)
    assert all("remove it there" in record.message for record in said[1:])
    change, before = one.agent.get_ip(VIP)["ip"]["history"][-1], one.agent.get_ip(VIP)["ip"]["history"][-2]
    assert f"vip={VIP} {change['reason']}" == said[0].message and change["event"] == "conflict"
    assert change["from"] == change["to"] == before["to"] and one.ip()["since"] == before["time"][:19] + "Z"


def test_who_answers_for_our_ip_and_announces_nothing_is_warned_of_each_minute_and_no_conflict(tmp_path, caplog):
    """The owner of an address that was given to LinK by mistake, or a router with proxy ARP."""
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    one.run(2)
    for _ in range(90):
        one.network.incoming.append(link.Heard(ADDRESS, b"\x02\0\0\0\0\x99", CLAIM, False))
        one.run(1, pace=0.05)
    assert [record.message.count("02:00:00:00:00:99: remove it there") for record in caplog.records] == [1, 1]
    assert one.ip()["bound"] and one.ip()["conflicts"]["count"] == 0


def test_a_standby_is_not_deaf_before_a_new_holder_has_been_asked_and_had_the_time_to_answer(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER, witnesses=["10.0.0.99"])
    ours, second, third = (link.Contender(f"a__lock__000000000{n}", n, f"node{n}") for n in (1, 2, 3))

    def hear(address: str, *contenders: link.Contender, seconds: float = 5.0) -> str:
        if contenders:
            one.agent.referee.queues[ADDRESS] = contenders
            one.agent.loop.post(one.agent.referee_news, ADDRESS)
        for _ in range(round(seconds / 0.02)):
            one.network.incoming += [link.Heard(address, OTHER_MAC, CLAIM, False)] * bool(address)
            one.run(0.02)
        return one.ip()["status"]

    hear("10.0.0.99", third, ours)
    one.agent.wire._ask_witnesses(one.time)  # who never answers again
    assert hear(ADDRESS) == "STANDBY"
    assert hear("", second, ours, seconds=0.9) == "STANDBY"
    assert hear("", seconds=1) == "FAILING" and "hears nobody" in one.ip()["reason"]
    one.agent.referee.records["node2"] = link.Record(OTHER_MAC.hex(":"), ("10.0.0.2",), "")
    one.agent.loop.post(one.agent.referee_news, "")
    hear("10.0.0.2", seconds=1.5)
    one.agent.wire._ask_witnesses(one.time)
    assert hear("10.0.0.2", seconds=2.5) == "STANDBY", (
        "the holder's own address answers, the IP has yet to be asked for"
    )


def test_who_loses_neighbour_discovery_alone_is_deaf_for_ipv6_and_not_for_ipv4():
    wire = link.Wire(0.05, 2.5, 3, lambda frames: None)
    wire.witnesses(["10.0.0.99", "fd77::99"])
    for witness in ("10.0.0.99", "fd77::99"):
        wire.hear(link.Heard(witness, OTHER_MAC, CLAIM, False), False, 0.5)
    wire._ask_witnesses(1.0)
    wire.hear(link.Heard("10.0.0.99", OTHER_MAC, CLAIM, False), False, 1.001)
    for accused in ((), ("10.0.0.2",), None):
        assert wire.deaf(1.9, accused, ADDRESS) == wire.deaf(1.9, accused) == 0 < wire.deaf(1.9, accused, "fd77::1")
    assert wire.deaf(1.9, ("fd77::99",), "fd77::1") == 0, "the other is all that is left"


def test_who_hears_only_what_is_told_to_everybody_is_deaf(tmp_path):
    """As behind a switch that takes its MAC for another port's: no answer arrives."""
    one = ByHand(tmp_path, FakeNetwork(arp=True), ips=[{"ip": VIP}], witnesses=["10.0.0.99"])
    one.network.incoming += [link.Heard(each, OTHER_MAC, CLAIM, False) for each in (ADDRESS, "10.0.0.99")]
    one.run(0.1)
    for _ in range(40):
        one.network.incoming += [link.Heard(ADDRESS, OTHER_MAC[:-1] + b"\x77", ASK, True)]
        one.run(0.1)
    assert one.ip()["status"] == "FAILING" and "hears nobody" in one.ip()["reason"] and not one.network.did("add")


def test_that_the_host_has_got_the_address_of_an_ip_for_itself_is_news_to_it(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    holder, ours = (link.Contender(f"a__lock__000000000{n}", n, f"node{n}") for n in (2, 1))
    one.agent.referee.queues[ADDRESS] = holder, ours
    one.agent.loop.post(one.agent.referee_news, ADDRESS)
    for turn in range(60):
        if turn == 50:  # nothing has moved for long: it is not decided on again
            assert one.ip()["status"] == "STANDBY"
            one.network.kernel[ipaddress.ip_interface("10.0.0.10/24")] = False
        one.network.incoming.append(link.Heard(ADDRESS, OTHER_MAC, CLAIM, False))
        one.run(0.1)
    assert one.ip()["status"] == "FAILING" and "has the address for itself" in one.ip()["reason"]


def test_a_new_ip_is_heard_at_once_and_the_kernel_is_told_the_whole_list_once_for_many(tmp_path):
    one, told = ByHand(tmp_path), list[set[str] | None]()
    one.run(2)
    one.network.hear_only = told.append
    added = [f"10.2.0.{n}" for n in range(1, 51)]
    for ip in added:
        one.call(one.agent.add_ip, {"ip": ip})
        assert told[-1] is None
    one.run(1)
    assert [each for each in told if each is not None] == [{*added}]


def test_who_has_asked_once_is_forgotten(tmp_path):
    wire = link.Wire(0.05, 2.5, 3, lambda frames: None)
    wire.add(ipaddress.ip_address(ADDRESS), 0.0)
    for n in range(1000):
        wire.hear(link.Heard(ADDRESS, n.to_bytes(6, "big"), ASK, True), True, 0.0)
    assert len(wire.askers(1.0)) == 1000
    wire.meet(3.0)
    assert not wire.askers(1.0)


def test_who_gives_way_and_hears_the_holder_again_asks_it_at_its_pace():
    sent, now = list[bytes](), 10.0
    wire, holder = link.Wire(0.05, 3.5, 3, sent.extend), b"\2\0\0\0\0\1"
    wire.use(b"\2\0\0\0\0\3", {})
    wire.add(ipaddress.ip_address(ADDRESS), now)
    wire.hear(link.Heard(ADDRESS, holder, CLAIM, False), True, now)
    wire.watch(ADDRESS, link.Look.FAST, b"")
    for heard in [False] * 20 + [True] * 40:  # it is silent for a while, then a lower MAC asks everybody, too
        sent.clear()
        now += 0.05
        wire.run(now)
        if heard:
            wire.give_way(ADDRESS, b"\2\0\0\0\0\2")
            wire.hear(link.Heard(ADDRESS, holder, CLAIM, False), True, now)
    assert wire.view(ADDRESS, now).met and not [frame for frame in sent if frame[0] == 0xFF]


def test_a_new_holder_that_has_not_bound_the_ip_yet_when_it_is_first_asked_is_asked_again_soon():
    """Only who has answered can fall silent: should it die before, its session's end would have to be waited for."""
    sent, times, holder = list[bytes](), list[int](), b"\2\0\0\0\0\1"
    wire = link.Wire(0.05, 3.5, 3, sent.extend)
    wire.use(b"\2\0\0\0\0\3", {})
    wire.add(ipaddress.ip_address(ADDRESS), 0.0)
    wire.term(ADDRESS, holder, 10.0)
    wire.watch(ADDRESS, link.Look.FAST, holder)
    for now in range(10_000, 13_000):  # ms; it announces the IP, but answers nothing
        if now == 10_015:
            wire.hear(link.Heard(ADDRESS, holder, CLAIM, True), True, now / 1000)
        if now / 1000 >= wire.due and (sent.clear() or wire.run(now / 1000) or sent):
            times.append(now)
    soon = [now for now in times if now < 11_000]
    assert len(soon) >= 19 and max(b - a for a, b in itertools.pairwise(soon)) <= 52
    assert len(times) - len(soon) <= 11, "but not for ever: it may have been away all the time"


def test_a_standby_says_that_the_holder_answers_when_it_has_answered_and_not_when_it_announces_the_ip(tmp_path):
    one, address = ByHand(tmp_path, FakeNetwork(arp=True), **ONE), "10.0.0.10"
    for broadcast, state in ((True, "looking"), (False, "answered")):
        one.network.incoming.append(link.Heard(address, OTHER_MAC, CLAIM, broadcast))
        one.run(0.02)
        assert one.ip()["wire"]["state"] == state and not one.ip()["bound"]


def test_of_many_witnesses_those_that_the_operator_names_are_asked_and_then_the_gateways(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER, witnesses=["10.0.0.98", "10.0.0.97"])
    one.network.gateways = lambda: ["10.0.0.254"]
    hosts = {f"node{n}": link.Record("", (f"10.0.0.{n + 100}",), "") for n in range(2, 12)}
    one.agent.referee.records.update(hosts)
    one.agent.referee_news("")
    one.run(6)
    one.network.done.clear()
    one.run(60)
    asked = {line.split()[1] for line in one.network.did("ask")}
    assert {"10.0.0.98", "10.0.0.97", "10.0.0.254"} < asked and len(asked - {ADDRESS}) == link.Wire.WITNESSES


def test_a_witness_is_met_at_once_as_the_kernel_lets_its_answer_through_before_it_is_asked(tmp_path):
    class Lan(FakeNetwork):
        """Whose gateway answers at once: it is heard by who listens for it by then."""

        listens, there = frozenset[str](), False

        def gateways(self):
            return ["10.0.0.254"] * self.there

        def hear_only(self, addresses):
            self.listens = frozenset(addresses)

        def send(self, frames):
            asked = {heard.address for heard in map(link.read_frame, frames) if heard and heard.kind is ASK}
            self.incoming += [link.Heard(each, OTHER_MAC, CLAIM, False) for each in asked & self.listens]

    one = ByHand(tmp_path, Lan(arp=True))
    one.run(10)
    one.network.there = True
    until(lambda: one.run(0.01) or one.agent.wire.known(), "the route is seen")
    one.run(0.02)
    assert any(one.agent.wire.known().values())


def test_what_was_left_with_its_prefix_length_and_is_not_configured_any_more_goes_too(tmp_path):
    network, left = FakeNetwork(), ipaddress.ip_interface("10.0.0.20/24")
    network.kernel[left] = True
    link.Store(config_of(tmp_path)).save_session({"states": {"10.0.0.20": "ACTIVATED"}}, now=True)
    one = ByHand(tmp_path, network)
    one.run(3)
    assert not any(network.kernel.values()) and not one.agent.vips
    assert network.done[:2] == ["add 10.0.0.20/32", "remove 10.0.0.20/24"]


def test_without_zookeeper_an_ip_moves_by_words_on_the_wire(tmp_path):
    one, address = ByHand(tmp_path, FakeNetwork(arp=True), **ONE), "10.0.0.10"

    def hear(kind: link.Kind, seconds: float = 0.02) -> None:
        one.network.incoming.append(link.Heard(address, OTHER_MAC, kind, kind is ASK))
        one.run(seconds)

    for _ in range(10):
        hear(CLAIM, 0.05)
    assert one.ip()["status"] == "STANDBY"
    order = one.agent.take_lock(address)
    one.run(0.02)
    assert one.network.did("want") and not order.done() and not one.ip()["bound"]
    hear(GIVE)
    assert one.ip()["bound"] and order.done()
    one.run(2)
    for word in ("failover", "want"):
        one.network.done.clear()
        hear(ASK)
        order = one.agent.failover(address) if word == "failover" else hear(WANT)
        one.run(0.1)
        assert one.network.did("give") == ["give 10.0.0.10"] and one.ip()["bound"]
        hear(CLAIM, 0.05), hear(CLAIM, 0.05), hear(CLAIM, 0.02)
        assert not one.ip()["bound"] and (order is None or order.done())
        one.run(2)  # it fell silent
        assert one.ip()["bound"]


def test_without_zookeeper_only_the_word_of_who_was_last_heard_to_have_the_ip_counts(tmp_path):
    one, stranger = ByHand(tmp_path, FakeNetwork(arp=True), **ONE), OTHER_MAC[:-1] + b"\x03"
    for sender, kind in [(OTHER_MAC, CLAIM), (stranger, GIVE), (OTHER_MAC, CLAIM)] * 5:
        one.network.incoming.append(link.Heard("10.0.0.10", sender, kind, False))
        one.run(0.05)
    assert not one.network.did("add")


def test_who_posts_an_ip_that_is_being_deleted_keeps_it_bound_under_a_new_id(tmp_path):
    one = ByHand(tmp_path, zookeeper="zk:2181")
    first = one.call(one.agent.add_ip, {"ip": VIP})
    one.run(1)
    one.agent.referee.enter("10.0.0.10", "node2")
    deleted = one.call(one.agent.delete_ip, first["id"])
    until(lambda: one.run(0.01) or one.agent.find(VIP).intent is Intent.DELETE)
    assert one.ip()["bound"] and not deleted.done()  # until the other host is heard
    second = one.call(one.agent.add_ip, {"ip": VIP, "checks": [RIGHT_CHECK], "healthcheck_interval": 1})
    assert deleted.result(5) is None and second["id"] != first["id"]
    assert (second["bound"], second["status"], len(second["checks"])) == (True, "ACTIVATED", 1)
    one.run(0.3)
    assert not one.network.did("remove") and one.agent.find(second["id"]).intent is RUN
    with pytest.raises(link.LinkError, match="not found"):
        one.agent.find(first["id"])


# == HTTP API: over a real socket ==============================================


@pytest.fixture
def host(tmp_path):
    with Served(tmp_path) as one:
        yield one


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A host with an IP of the API's and one of the configuration's; for requests that change nothing."""
    with Served(tmp_path_factory.mktemp("busy"), ips=[{"ip": "10.0.0.30"}]) as one:
        assert one.ask("POST", "/ips", {"ip": VIP, "healthcheck_interval": 9}).status == 201
        yield one


RIGHT = b"Authorization: Basic " + base64.b64encode(b"u:p") + b"\r\n"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A host with a password, which RIGHT has; for requests that change nothing."""
    with Served(tmp_path_factory.mktemp("guarded"), user="u", password="p") as one:
        yield one


CHECK = {"type": "TCP", "host": "127.0.0.1", "port": 1}
TCP = {**CHECK, "path": "/"}


@table("vip", [VIP, VIP6])
def test_the_life_of_an_ip_call_by_call(host, tmp_path, vip):
    status, ip, _ = host.ask("POST", "/ips", {"ip": vip, "checks": [], "healthcheck_interval": 7})
    assert status == 201
    assert re.fullmatch(r"vip-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", ip["id"])
    wanted = {"ip": vip, "checks": [], "healthcheck_interval": 7, "status": "ACTIVATED", "bound": True, "hosts": []}
    assert wanted.items() <= ip.items() and ip["holder"] == "node1" and ip["reason"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", ip["since"])
    assert host.ask("GET", "/ips").body == {"ips": [ip]}
    bare = vip.partition("/")[0]
    spelled = [ipaddress.ip_address(bare).exploded.upper(), f"[{bare}]"]
    for key in (ip["id"], vip, bare, vip.replace("/", "%2F"), vip.replace(":", "%3a"), *spelled):
        status, body, _ = host.ask("GET", f"/ips/{key}")
        assert (status, body["ip"].pop("history")[-1]["to"], body) == (200, "ACTIVATED", {"ip": ip})
        assert host.ask("POST", f"/ips/{key}/lock").status == 204  # it has it already
        assert host.ask("POST", f"/ips/{key}/failover").body["error"] == "nobody can take it"
    for method, checks in (("PATCH", [TCP]), ("PUT", [{**TCP, "port": 2}, TCP])):
        status, body, _ = host.ask(method, f"/ips/{ip['id']}", {"healthchecks": checks})
        assert (status, body["id"], body["checks"]) == (200, ip["id"], checks)
    assert [vip.to_json()["checks"] for vip in stored(tmp_path)] == [checks]
    status, body, headers = host.ask("DELETE", f"/ips/{vip}")
    assert (status, body, headers["Content-Length"]) == (204, None, None)
    assert host.ask("GET", f"/ips/{vip}")[:2] == (404, {"resource": "IP", "error": "not found"})
    assert host.ask("GET", "/ips").body == {"ips": []}
    assert host.network.did("add", "remove") == [f"add {vip}", f"remove {vip}"]
    assert host.ask("POST", "/ips", {"ip": vip}).status == 201


def test_version_and_health_say_what_they_should(tmp_path):
    with Served(tmp_path, **WITH_ZOOKEEPER) as host:
        assert host.ask("GET", "/version")[:2] == (200, {"version": link.VERSION})
        host.wait("ACTIVATED", "node1")
        status, body, headers = host.ask("GET", "/health")
        assert (status, body["healthy"], headers["Content-Type"]) == (200, True, "application/json")
        assert body["ips"] == {"ACTIVATED": 1, "STANDBY": 0, "FAILING": 0}
        assert body["zookeeper"] == {"state": "connected", "session_timeout": 4.0, "refused": None}
        host.network.link = host.network.link._replace(up=False, trouble="eth0 is down")
        host.agent.loop.post(lambda: None)
        until(lambda: host.ask("GET", "/health").status == 503)
        assert host.ask("GET", "/health").body["interface"] == "eth0 is down"


@table("vip, change, healthy", [
    (VIP, {"trouble4": "arp_ignore is 8"}, False), (VIP, {"trouble6": "IPv6 is off"}, True),
    (VIP6, {"trouble6": "IPv6 is off"}, False), (VIP6, {"trouble4": "arp_ignore is 8"}, True),
])  # fmt: skip
def test_health_tells_what_keeps_the_ips_from_being_served(tmp_path, vip, change, healthy):
    one = ByHand(tmp_path, ips=[{"ip": vip}])
    one.network.link = one.network.link._replace(**change)
    one.run(7, pace=0.1)
    health = one.agent.health()
    assert health["healthy"] is healthy and ({*change.values()} <= {*health["trouble"]}) is not healthy


@table("protocol, tries", [(link.ETH_P_ARP, (5, 13)), (link.ETH_P_IPV6, (1, 3))])
def test_a_host_that_can_send_nothing_is_not_well_tries_again_soon_and_is_well_again_when_it_can(
    tmp_path, protocol, tries
):
    """What is lost of the other protocol is no reason to announce an IP more often."""
    one = ByHand(tmp_path, FakeNetwork(arp=True), **ONE)
    one.run(80, pace=0.1)
    said = len(one.network.did("announce"))
    one.network.unsent, one.network.send_error = {protocol: (0.0, 9.0, "No buffer space available")}, "cannot send"
    one.run(120, pace=0.1)
    assert one.agent.health()["trouble"] == ["cannot send"] and not one.agent.health()["healthy"]
    assert 2 * tries[0] <= len(one.network.did("announce")) - said <= 2 * tries[1]
    one.network.unsent, one.network.send_error = {}, ""
    one.run(2, pace=0.1)
    assert one.agent.health()["healthy"]
    assert [was["event"] for was in one.agent.health()["history"]] == ["trouble", "recovered"]


def test_that_an_ip_is_on_two_hosts_is_trouble_while_it_lasts_but_not_what_is_over_in_a_moment(tmp_path):
    """As with two clusters that do not know each other: each host has the lock of its own."""
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)

    def rivalled(seconds: float) -> list[str]:
        for _ in range(round(seconds / 0.1)):
            one.network.incoming.append(link.Heard(ADDRESS, b"\x02\0\0\0\0\x99", CLAIM, True))
            one.run(0.1, pace=0.1)
        return one.agent.health()["trouble"]

    one.run(5)
    assert rivalled(0.9) == [] and one.ip()["conflicts"]["count"] == 1
    one.run(20, pace=0.1)
    assert rivalled(0.9) == [], "twice in a minute it is over in a moment, too"
    one.run(80, pace=0.1)
    (said,) = rivalled(4)
    assert f"{VIP} is on two hosts, here and at 02:00:00:00:00:99: remove it there" in said and "zookeeper" in said
    assert rivalled(200) == [said] and not one.agent.health()["healthy"]
    assert [was["event"] for was in one.agent.health()["history"]] == ["trouble"]
    one.run(12, pace=0.1)
    assert one.agent.health()["trouble"] == [] and one.ip()["conflicts"]["count"] == 2


def test_health_tells_that_another_host_has_this_ones_mac_and_that_nobody_is_heard(tmp_path):
    one = ByHand(tmp_path, **WITH_ZOOKEEPER)
    one.agent.peers = {"node2": link.Record(MAC.hex(":"), (), ""), "node3": link.Record(OTHER_MAC.hex(":"), (), "")}
    said = f"node2 has this host's MAC {MAC.hex(':')}: give one of them its own"
    assert one.agent.health()["trouble"] == [said] and not one.agent.health()["healthy"]
    one.agent.peers["node2"] = link.Record(MAC.hex(":"), (), link.boot_id())
    assert one.agent.health()["healthy"], "it is another agent of this machine, as on a VLAN"
    one.agent.vips["10.0.0.10"].reason = f"checks fail ({one.agent.hears_nobody})"
    assert one.agent.health()["trouble"] == [one.agent.hears_nobody] and not one.agent.health()["healthy"]


def test_health_tells_that_nobody_is_heard_also_of_a_host_that_has_taken_the_ip_for_that(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), ips=[{"ip": VIP}], witnesses=["10.0.0.99"])
    for _ in range(100):
        one.network.incoming += [link.Heard(each, OTHER_MAC, CLAIM, False) for each in ("10.0.0.99", ADDRESS)]
        one.run(0.02)
    assert one.ip()["status"] == "STANDBY" and one.agent.health()["healthy"]
    one.run(12)
    assert one.ip()["bound"] and one.agent.health()["trouble"] == [one.agent.hears_nobody]
    one.network.incoming.append(link.Heard("10.0.0.99", OTHER_MAC, CLAIM, False))
    one.run(0.1)
    assert one.ip()["bound"] and one.agent.health()["healthy"]


def test_health_tells_of_an_ip_that_is_kept_while_who_has_its_lock_is_not_heard(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    one.run(1)
    theirs, ours = (link.Contender(f"a__lock__000000000{n}", n, f"node{n}") for n in (2, 1))
    assert one.ip()["bound"]
    one.agent.referee.queues[ADDRESS] = (theirs, ours)
    one.agent.loop.post(one.agent.referee_news, ADDRESS)
    one.run(5)
    assert one.ip()["bound"] and one.agent.health()["healthy"], "it may be about to take it"
    one.run(6)
    assert one.ip()["bound"]
    assert one.agent.health()["trouble"] == [f"{VIP} is kept: node2 has the lock but is silent; mend the LAN"]
    one.network.incoming.append(link.Heard(ADDRESS, OTHER_MAC, CLAIM, True))
    one.run(0.2)
    assert not one.ip()["bound"] and one.agent.health()["healthy"]


def test_the_lock_of_a_host_that_promises_at_most_one_is_taken_over_by_nobody(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER)
    theirs, ours = (link.Contender(f"a__lock__000000000{n}", n, f"node{n}") for n in (2, 1))
    one.agent.referee.queues[ADDRESS] = (theirs, ours)
    for promise, taken in (("at-most-one", False), ("", True), ("at-least-one", True)):
        one.agent.referee.records["node2"] = link.Record(OTHER_MAC.hex(":"), (), "", promise)
        one.agent.loop.post(one.agent.referee_news, "")
        one.run(2)
        vip = one.agent.vips[ADDRESS]
        assert vip.facts(one.time, vip.lock(one.time)).next is taken
        assert ("node2 does not promise at-least-one" in str(one.agent.health()["trouble"])) is not taken
        if not taken:
            with pytest.raises(link.LinkError, match="at-most-one"):
                one.agent.take_lock(ADDRESS)


def test_what_zookeeper_refuses_for_many_ips_is_told_for_the_first_ones_and_history_keeps_each_trouble(tmp_path):
    one = link.Referee(config_of(tmp_path, **WITH_ZOOKEEPER), lambda: 0.0, lambda *_: None, lambda _: None)
    one._places |= {str(n): link._Place(str(n), "", print, why=f"refused {n}") for n in range(300)}
    assert one.refused == "refused 0; refused 1; refused 2; and 297 more"
    told = ByHand(tmp_path, **ONE)
    for trouble in ("A", "B", "C"):
        told.network.link = told.network.link._replace(trouble=trouble)
        told.run(7)
    assert [change["reason"] for change in told.agent.health()["history"]] == ["A", "B", "C"]


def test_a_zookeeper_that_ends_each_session_at_once_is_said_once_and_with_the_remedy(tmp_path, caplog):
    caplog.set_level("INFO")
    one = link.Referee(config_of(tmp_path, **WITH_ZOOKEEPER), lambda: 0.0, lambda *_: None, lambda _: None)
    one._client = types.SimpleNamespace(client_id=None)
    for _ in range(20):
        one._on_state((1, b""), False)
        one._on_state(None, False)
    assert "ends each session at once: see zookeeper_auth" in one.refused
    assert len(caplog.records) == 3  # connected, out of reach, and why
    one._on_state((1, b""), False)
    one._listed(one._hosts, [], 0.0)
    assert one.refused == ""
    one._on_state(None, False)  # a session that was of use, and is lost, is no refusal
    assert one.refused == "" and caplog.records[-1].message == "ZooKeeper: out of reach"


def test_a_record_that_has_changed_is_read_again_though_its_watch_is_told_of_before_the_reading_that_set_it(tmp_path):
    """kazoo has a thread for watches and one for answers: a host that was replaced would be nameless for ever."""
    one = link.Referee(config_of(tmp_path, **WITH_ZOOKEEPER), lambda: 0.0, lambda *_: None, lambda _: None)
    one._client = mock.MagicMock(client_id=(1, b""))
    one._on_state((1, b""), False)
    hosts, reads = one._hosts, one._client.get_async
    one._listed(hosts, ["node2"], 0.0)
    one._fired("", "node2", None)
    one._read("node2", hosts, (b"", types.SimpleNamespace(ephemeralOwner=7)), 0.0)
    assert reads.call_count == 1
    one._listed(hosts, ["node2"], 0.0)
    assert reads.call_count == 2
    one._read("node2", hosts, (b"", types.SimpleNamespace(ephemeralOwner=8)), 0.0)
    one._listed(hosts, ["node2"], 0.0)
    assert (reads.call_count, hosts.owners[8]) == (2, "node2")


def test_a_zookeeper_that_is_only_slow_is_not_said_to_end_sessions(tmp_path):
    now = 0.0
    one = link.Referee(config_of(tmp_path, **WITH_ZOOKEEPER), lambda: now, lambda *_: None, lambda _: None)
    one._client = mock.MagicMock(client_id=(1, b""))
    one._on_state((1, b""), False)
    now = 1.0
    one.tick(now)  # nothing was answered for an eighth of the session: another server is tried
    assert one._client._connection._socket.shutdown.called
    one._on_state(None, False)
    assert one.refused == ""
    one._on_state((1, b""), False)
    one._on_state(None, False)  # this time it was the server
    assert "ends each session at once" in one.refused


def test_a_zookeeper_that_has_ended_the_session_of_a_suspended_host_is_not_said_to_end_each(tmp_path):
    one = link.Referee(config_of(tmp_path, **WITH_ZOOKEEPER), lambda: 0.0, lambda *_: None, lambda _: None)
    one._client = mock.MagicMock()
    one._on_state((1, b""), False)
    one._listed(one._hosts, [], 0.0)
    one.distrust()  # the loop was late
    one._on_state(None, True)
    assert one.refused == ""


def test_why_zookeeper_is_out_of_reach_is_told_in_health_and_once_in_the_log(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    said = queue.SimpleQueue()
    client = link._kazoo_client(config_of(tmp_path, zookeeper=f"127.0.0.1:{port}"), None, said.put)
    client.start_async()
    refused = said.get(timeout=10)
    client.stop()
    one = ByHand(tmp_path, **WITH_ZOOKEEPER)
    referee = link.Referee(one.agent.config, lambda: 0.0, lambda *_: None, lambda _: None)
    referee._client = mock.MagicMock()
    with caplog.at_level("INFO"):
        for what in (refused, "Transition to CONNECTING", refused):
            referee._said(what)
    assert refused.endswith("Connection refused") and caplog.text.count(refused) == 1
    one.agent.referee.state, one.agent.referee.causes = "lost", referee.causes
    assert f"ZooKeeper is lost: {refused}" in one.agent.health()["trouble"]
    referee._on_state((1, b""), False)
    assert referee.causes == ""


def test_a_server_that_is_no_zookeeper_and_never_ends_is_left_soon_and_what_is_said_of_it_has_no_password(tmp_path):
    said, sent = queue.SimpleQueue[str](), queue.SimpleQueue[int]()

    def flood(server: socket.socket) -> None:
        client, count = server.accept()[0], 0
        with contextlib.suppress(OSError), client:  # it goes away
            while count < 1 << 27:
                count += client.send(b"@" * 65536)
        sent.put(count)

    with socket.create_server(("127.0.0.1", 0)) as server:
        config = config_of(tmp_path, zookeeper=f"127.0.0.1:{server.getsockname()[1]}")
        client = link._kazoo_client(config, (7, b"-secret-of-it-16"), said.put)
        link._tell_granted(client, lambda timeout: None)
        threading.Thread(target=flood, args=(server,), daemon=True).start()
        client.start_async()
        words = [said.get(timeout=20) for _ in range(2)]
        assert sent.get(timeout=20) < 1 << 26
        client.stop()
    assert "secret" not in str(words) and "Connection dropped: invalid server response" in words


def test_a_host_is_not_well_again_while_zookeeper_is_yet_to_be_reached(tmp_path):
    one = ByHand(tmp_path, **WITH_ZOOKEEPER)
    for state in ("connected", "connecting", "lost", "connecting", "connected"):
        one.agent.referee.state = state
        one.run(2)
    told = [change["reason"] for change in one.agent.health()["history"]]
    assert told == ["ZooKeeper is lost", "nothing is wrong"]


def test_what_is_wrong_with_a_host_is_a_change_that_is_remembered_and_told_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(link.Notices, "tell", lambda _, change: told.append(change))
    one = ByHand(tmp_path, **ONE)
    one.run(3)
    assert one.agent.health()["history"] == []
    for trouble in ("no carrier", "is dormant"):
        one.network.link = one.network.link._replace(trouble=trouble)
        one.run(7)
    one.agent.store._disk.submit(int).result(5)  # after all before it
    again = ByHand(tmp_path, one.network, **ONE)
    again.run(3)
    again.network.link = again.network.link._replace(trouble="")
    again.run(7)
    told = [{**change, "time": ""} for change in told if not change["ip"]]
    words = [("healthy", "unhealthy", "trouble", "no carrier"), ("unhealthy", "unhealthy", "trouble", "is dormant"),
             ("unhealthy", "healthy", "recovered", "nothing is wrong")]  # fmt: skip
    keys, more = ("from", "to", "event", "reason"), {"host": "node1", "ip": "", "time": "", "by": None}
    assert told == [{**dict(zip(keys, each, strict=True)), **more} for each in words]
    assert [each["reason"] for each in again.agent.health()["history"]] == [reason for *_, reason in words]


def test_who_was_known_by_zookeeper_is_forgotten_where_there_is_none_any_more(tmp_path):
    """Else a host of later days would be a stranger for ever: its probes and orders count for nothing."""
    one = ByHand(tmp_path, **WITH_ZOOKEEPER)
    one.agent.loop.post(one.agent.referee_news, "")
    one.run(1)
    assert one.agent.macs and one.agent.peers
    one.agent.save()
    later = ByHand(tmp_path, **ONE)
    assert not later.agent.macs and not later.agent.peers


def test_an_ip_of_ours_is_no_witness(tmp_path):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **WITH_ZOOKEEPER, witnesses=["10.0.0.11", "10.0.0.20"])
    one.agent.peers = {"node2": link.Record("", ("10.0.0.10", "10.0.0.12"), "")}
    one.agent._find_witnesses()
    assert [*one.agent.wire.known()] == ["10.0.0.11", "10.0.0.20", "10.0.0.12"]


@table("zeros", [{"id": ""}, {"checks": None}])
def test_the_clients_of_the_original_are_understood_and_understand(host, zeros):
    """What the versions of Scalingo/link's HTTPClient send (Go's zero values, no Content-Type) and decode."""
    status, body, _ = host.ask("POST", "/ips", {"ip": VIP, "healthcheck_interval": 0, **zeros})
    assert status == 201, body
    types = {"id": str, "ip": str, "status": str, "checks": list, "healthcheck_interval": int}
    for ip in (body, host.ask("GET", "/ips").body["ips"][0], host.ask("GET", f"/ips/{VIP}").body["ip"]):
        assert {key: type(ip[key]) for key in types} == types and ip["healthcheck_interval"] == 5
    status, body, _ = host.ask("PATCH", f"/ips/{ip['id']}", {"healthchecks": [CHECK]})
    assert (status, {key: body["checks"][0][key] for key in CHECK}) == (200, CHECK)
    assert host.ask("PATCH", f"/ips/{ip['id']}", {"healthchecks": None}).body["checks"] == []
    for zero in (0, None):
        for every in (9, zero):
            body = host.ask("PATCH", f"/ips/{ip['id']}", {"healthcheck_interval": every}).body
            assert body["healthcheck_interval"] == (every or 5)
    assert host.ask("DELETE", f"/ips/{ip['id']}").status == 204


def test_todays_client_of_the_original_is_understood_and_understands(host):
    """link-client v3: api/http_client.go and api/types.go of Scalingo/link; some of its versions read a bare answer."""
    asked = {"healthcheck_interval": 0, "checks": None, "plugin": "arp", "plugin_config": {"ip": "10.0.0.10/24"}}
    status, body, _ = host.ask("POST", "/endpoints", asked)
    ip = body["endpoint"]
    assert status == 201 and ip.items() <= body.items() and (ip["plugin"], ip["election_key"]) == ("arp", "10.0.0.10")
    for path in ("/endpoints", "/ips"):
        assert [shown["id"] for shown in host.ask("GET", path).body[path[1:]]] == [ip["id"]]
    assert host.ask("GET", f"/endpoints/{ip['id']}").body["endpoint"]["status"] == "ACTIVATED"
    assert host.ask("GET", f"/endpoints/{ip['id']}/hosts").body == {"hosts": []}
    assert host.ask("PATCH", f"/endpoints/{ip['id']}", {"healthchecks": [CHECK]}).body["checks"][0]["port"] == 1
    assert host.ask("POST", f"/endpoints/{ip['id']}/failover").body["error"] == "nobody can take it"
    assert host.ask("DELETE", f"/endpoints/{ip['id']}").status == 204
    assert host.ask("GET", "/endpoints").body == {"endpoints": []}


def test_an_address_that_somebody_is_known_to_have_for_itself_is_refused_by_name(tmp_path):
    more = {"zookeeper": "10.0.0.21:2181,[fd77::22]:2181,zk:2181", "witnesses": ["10.0.0.31"]}
    owners = {
        "10.0.0.21": "ZooKeeper",
        "fd77:0::22": "ZooKeeper",
        "10.0.0.31/24": "a gateway or witness",
        "10.0.0.254": "a gateway or witness",
        "10.0.0.2/32": "node2",
    }
    owners |= dict.fromkeys(["10.0.0.1/32", "10.0.0.255/32"], "this host, or its network,")
    with Served(tmp_path, **more) as host:
        host.network.gateways = lambda: ["10.0.0.254"]
        host.agent.referee.records["node2"] = link.Record("", ("10.0.0.2",), "")
        host.agent.loop.post(host.agent.referee_news, "")
        until(lambda: {"10.0.0.254", "10.0.0.2"} <= {*host.agent.wire.known()})
        for ip, owner in owners.items():
            status, body, _ = host.ask("POST", "/ips", {"ip": ip})
            assert status == 400 and f"an address that {owner} has for itself" in body["detail"], (ip, body)
        assert host.ask("GET", "/ips").body == {"ips": []}


@table("number, waits", [(errno.EMFILE, True), (errno.ENFILE, True), (errno.ECONNABORTED, False)])
def test_out_of_descriptors_the_api_tries_again_at_its_leisure_and_the_loop_has_its_time(host, number, waits):
    with link.Server(host.agent) as server:
        server.socket.close()
        server.socket = mock.Mock(accept=mock.Mock(side_effect=OSError(number, "")))
        began = time.monotonic()
        with pytest.raises(OSError):
            server.get_request()
        assert (time.monotonic() - began >= 0.09) is waits


@table("path", ["/ips", f"/ips/{VIP}", "/health", "/version", "/nowhere"])
def test_head_is_get_without_a_body(busy, path):
    head, get = busy.ask("HEAD", path), busy.ask("GET", path)
    assert (head.status, head.body, head.headers["Content-Type"]) == (get.status, None, get.headers["Content-Type"])
    assert abs(int(head.headers["Content-Length"]) - int(get.headers["Content-Length"])) < 20
    assert busy.raw(f"HEAD {path} HTTP/1.0\r\n\r\n".encode()).endswith(b"\r\n\r\n")


HOSTS = {
    **dict.fromkeys(["127.0.0.1:1313", "10.0.0.1", "[::1]:80", "localhost", "node1", "Node1.:1313"], 200),
    **dict.fromkeys(["evil.example", "127.0.0.1.evil.example:1313", "node1.evil.example", "", "127.0.0.1, evil"], 403),
    socket.gethostname(): 200, "localhost\r\nHost: evil.example": 403,
    "localhost\r\nOrigin: http://evil.example": 403, "127.0.0.1\r\nOrigin: null": 403,
}  # fmt: skip


@table("value, status", HOSTS.items())
def test_a_web_page_is_refused_with_the_remedy(busy, value, status):
    head, _, body = busy.raw(f"GET /version HTTP/1.1\r\nHost: {value}\r\n\r\n".encode()).partition(b"\r\n\r\n")
    assert b" %d " % status in head[:14]
    assert status == 200 or re.search("Host must be|leave out Origin", json.loads(body)["detail"])


def wrong(status: int, error: str, *calls: tuple[str, str, Iterable[Any]]) -> Iterator[tuple[str, str, Any, int, str]]:
    return ((method, path, body, status, error) for method, path, bodies in calls for body in bodies)


TWICE = b'{"ip": "10.0.0.11", "checks": [{"type": "TCP", "host": "10.0.0.9", "port": 1, "port": 2}]}'
NEW, MINE, GIVEN = {"ip": "10.0.0.11"}, f"/ips/{VIP}", "/ips/10.0.0.30"
BAD_IPS = ["10.0.0.0/24", "10.0.0.255/24", "224.0.0.1", "127.0.0.1", "::", "fe80::1", "10.0.0.11/0", "x", "", None, 5]
OWN = ["10.0.0.1", "10.0.0.1/24", "fd77::1", "fd77::1/64"]
BAD_CHECKS = [{}, "", 5, False, TCP, [5], *([{**TCP, **bad}] for bad in ({"port": 0}, {"port": "1"}, {"colour": 1}))]
BAD_INTERVALS = [-1, 3601, 1.5, "5", True, [5], 10**30, 1e300]
NOWHERE = ["vip-1", "10.0.0.99", "fd77::99", "10.0.0.10/24", "%00", "%ff%2f..%zz", "a" * 9000, ".", "%20"]
WRONG_CALLS = [
    *wrong(400, "invalid json", ("POST", "/ips", (b"", b"{", b"\xff", b"[" * 60000, b"nil")), ("PATCH", MINE, (b"{",)),
           ("POST", "/ips", (b'{"ip": "10.0.0.11", "checks": [], "ip": "10.0.0.12"}', TWICE))),
    *wrong(400, "invalid IP", ("POST", "/ips", [{"ip": ip} for ip in BAD_IPS + OWN])),
    *wrong(400, "invalid IP", ("POST", "/ips", ([], b"null", 5, "x", {}, {**NEW, "colour": 1}, {**NEW, "id": "x"}))),
    *wrong(400, "invalid", ("POST", "/ips", [{**NEW, "healthcheck_interval": every} for every in BAD_INTERVALS])),
    *wrong(400, "invalid", ("POST", "/ips", [{**NEW, "checks": checks} for checks in BAD_CHECKS])),
    *wrong(400, "invalid", ("PATCH", MINE, [{"healthcheck_interval": every} for every in BAD_INTERVALS])),
    *wrong(400, "invalid", ("PUT", MINE, [{"healthchecks": checks} for checks in BAD_CHECKS])),
    *wrong(400, "invalid", ("PATCH", MINE, ([], b"null", {"ip": "10.0.0.12"}, {"id": "x"}))),
    *wrong(409, "already exists", ("POST", "/ips", [{"ip": ip} for ip in (VIP, "10.0.0.10/24", "10.0.0.30")])),
    *wrong(409, "configured", ("PATCH", GIVEN, ({"healthchecks": []},)), ("DELETE", GIVEN, (None,))),
    *wrong(409, "nobody can take it", ("POST", f"{MINE}/failover", (None, {}))),
    *((verb, f"/ips/{key}", {"checks": []}, 404, "not found") for key in NOWHERE for verb in ("GET", "PUT", "DELETE")),
    *(("POST", f"/ips/{key}/{word}", None, 404, "not found") for key in NOWHERE for word in ("lock", "failover")),
    ("POST", f"{MINE}/bogus", None, 404, "not found"),
    *(("GET", path, None, 404, "not found") for path in ("/ip", "/ipsx", "/version/1", "/metrics/1", "/ips//lock")),
    *((method, "/nowhere", b"{", 404, "not found") for method in ("POST", "BREW", "OPTIONS", "HEAD")),
    *((method, "/ips", None, 405, "GET, HEAD, POST") for method in ("DELETE", "OPTIONS", "BREW", "TRACE")),
    ("POST", MINE, {}, 405, "DELETE, GET, HEAD, PATCH, PUT"),
    *((method, f"{MINE}/{word}", None, 405, "POST") for method in ("GET", "DELETE") for word in ("lock", "failover")),
    *((method, path, {}, 405, "GET, HEAD") for method in ("POST", "PUT") for path in ("/version", "/metrics", "/")),
    *((method, f"/endpoints/10.0.0.9{more}", {}, 404, "not found") for method, more in (
        ("GET", ""), ("GET", "/hosts"), ("PATCH", ""), ("DELETE", ""), ("POST", "/failover"))),
    *wrong(400, "invalid", ("POST", "/endpoints", ({}, [], {"plugin": "outscale_public_ip", "plugin_config": NEW}, NEW,
        {"plugin": "arp", "plugin_config": {"ip": "10.0.0.0/24"}}, {"plugin": "arp", "plugin_config": 5}))),
    *((method, "/ips", b" " * 65537, 413, "body too large") for method in ("POST", "GET")),
]  # fmt: skip


@table("method, path, body, status, error", WRONG_CALLS)
def test_a_wrong_request_is_refused_and_changes_nothing(busy, method, path, body, status, error):
    before, answer = busy.ips(), busy.ask(method, path, body)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json"), answer
    if status == 405:
        assert answer.headers["Allow"] == error
    elif status == 404 and method != "HEAD":
        known = re.match(r"/(ips|endpoints)/[^/]+(/24)?(/lock|/failover|/hosts)?$", path)
        assert answer.body == {"error": error, "resource": "IP" if known else "path"}
    elif method != "HEAD":
        assert answer.body["error"].startswith(error) and answer.body["detail"]
    assert busy.ips() == before


def test_of_two_keys_of_one_name_a_body_says_which_and_that_is_not_slow(busy):
    assert busy.ask("POST", "/ips", TWICE).body["detail"] == "the key 'port' is there twice: remove one"
    began = time.monotonic()
    many = b"{" + b",".join(b'"%d":1' % n for n in range(6000)) + b',"5999":1}'
    assert busy.ask("POST", "/ips", many).body["detail"] == "the key '5999' is there twice: remove one"
    assert time.monotonic() - began < 1


@table("target, host, status", [
    ("http://10.0.0.1:1313/version", "10.0.0.1:1313", 200), ("HTTPS://localhost/version?x=1", "localhost", 200),
    ("http://[::1]:1313", "localhost", 200), ("http://localhost?now", "localhost", 200),
    ("http://localhost/version", "evil.example", 200),  # the target's counts
    ("http://evil.example/version", "localhost", 403), ("http://u:p@evil.example/version", "localhost", 403),
    ("http:///version", "localhost", 404), ("ftp://localhost/version", "localhost", 404),
    ("http://localhost/http://localhost/version", "localhost", 404),
])  # fmt: skip
def test_the_target_of_a_request_may_be_a_whole_url(busy, target, host, status):
    """RFC 9112, section 3.2.2."""
    head, _, body = busy.raw(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).partition(b"\r\n\r\n")
    assert f" {status} ".encode() in head.partition(b"\r\n")[0] and json.loads(body)


POST = b"POST /ips HTTP/1.1\r\n"
RAW = [
    (411, POST + b"\r\n"), (411, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    (415, POST + b"Content-Length: 2\r\nContent-Type: text/xml\r\n\r\n{}"),
    (400, POST + b"Content-Length: 2\r\nContent-Type: application/json; charset=utf-8\r\n\r\n{}"),
    *((400, POST + b"Content-Length: " + length + b'\r\n\r\n{"ip": "10.0.0.11"}') for length in
      (b"-1", b"+19", b"19, 19", b"two", b"", b"0x13", b"19\r\nContent-Length: 18", b"9" * 5000, b"50")),
    (413, POST + b"Content-Length: " + b"9" * 17 + b"\r\n\r\n{}"), (400, b"GARBAGE\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),  # a TLS hello
    *((status, b"GET /ips HTTP/" + text + b"\r\n\r\n") for status, text in
      ((400, b"1.1 x"), (400, b"x"), (505, b"3.0"))),
    (414, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n"), (200, b"GET /ips HTTP/1.0\r\n\r\n"),
    (431, b"GET /ips HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
    (431, b"GET /ips HTTP/1.1\r\nX: " + b"y" * 70000 + b"\r\n\r\n"),
    (200, b"GET /ips/?now=1 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
]  # fmt: skip


@table("status, data", RAW)
def test_what_is_hardly_http_is_answered_in_json_too(busy, status, data):
    before = busy.ips()
    head, _, body = busy.raw(data).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] %d " % status, head), (head, body)
    assert b"Connection: close" in head and json.loads(body)
    assert busy.ips() == before


def test_the_api_is_described_as_it_is_served_and_as_the_readme_says(busy, guarded):
    before, said = busy.ips(), busy.ask("GET", "/openapi.json").body
    openapi_spec_validator.validate(said)
    verbs = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    known = {(verb, path): item.get(verb.lower()) for path, item in said["paths"].items() for verb in verbs}
    for (verb, path), operation in known.items():
        status = busy.ask(verb, path.replace("{id}", "vip-1")).status
        assert str(status) in operation["responses"] if operation else status == 405, (verb, path, status)
    told = dict[tuple[str, ...], str]()
    for calls, status, _ in readme_table("| call | success | what |"):
        told |= {(*call.replace(":id", "{id}").split(),): status for call in calls.split(", ")}
    main = [call for call in known if known[call] and call[0] not in ("HEAD", "PUT") and "/endpoints" not in call[1]]
    assert {*main} == {*told} and all(told[call] in known[call]["responses"] for call in main)
    assert "/openapi.json" in busy.ask("GET", "/").body["links"]
    assert "401" not in str(said) and busy.ips() == before
    said = guarded.ask("GET", "/openapi.json", None, {"Authorization": f"Basic {link.credentials('u', 'p')}"}).body
    assert said["security"] == [{"basic": []}] and "401" in said["paths"]["/ips"]["get"]["responses"]


def test_no_request_body_makes_the_server_fail(busy):
    dice, before = random.Random(3), busy.ips()
    junk = [None, 0, -1, 1.5, True, "", "x", "\ud800", "10.0.0.0/8", [], {}, [[]], [None], {"a": 1}, 10**400, math.nan]
    for _ in range(300):
        check = {key: dice.choice(junk) for key in ("type", "host", "port", "path") if dice.random() < 0.8}
        keys = dice.sample(["ip", "checks", "healthchecks", "healthcheck_interval", "id", "\0", "\ud800"], 3)
        body = {key: dice.choice([*junk, check, [check], [{**TCP, **check}]]) for key in keys}
        assert busy.ask(*dice.choice([("POST", "/ips"), ("PATCH", "/ips/vip-1")]), body).status in (400, 404), body
    assert busy.ips() == before


def test_without_the_password_every_answer_is_401(tmp_path):
    right = "Basic " + base64.b64encode("admin:geh€im:x".encode()).decode()
    with Served(tmp_path, user="admin", password="geh€im:x") as host:
        for call in (("GET", "/ips", None), ("GET", "/x", None), ("BREW", "/ips", None), ("PUT", "/ips", b" " * 70000)):
            for given in ("", "Basic", "Basic !", right[:-4], right.replace("Basic", "Bearer"), right + "x", None):
                status, body, headers = host.ask(*call, {"Authorization": given} if given is not None else {})
                assert (status, body, headers["WWW-Authenticate"][:5]) == (401, {"error": "unauthorized"}, "Basic")
        assert host.ask("GET", "/ips", None, {"Authorization": right}).status == 200
        assert host.ask("GET", "/nowhere", None, {"Authorization": right.replace("Basic", "basic")}).status == 404


def test_where_the_state_directory_cannot_be_written_nothing_is_changed_and_the_answer_is_503(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    with Served(state) as host:
        host.ask("POST", "/ips", {"ip": VIP})
        before = host.ips()
        state.rename(tmp_path / "moved")
        state.write_text("a regular file: also root cannot write below it")
        for call in (("POST", "/ips", NEW), ("PATCH", MINE, {"healthchecks": [TCP]}), ("DELETE", MINE)):
            status, body, _ = host.ask(*call)
            assert status == 503 and str(state) in body["detail"]
        assert host.ips() == before


def test_a_stalled_disk_stops_no_loop_and_a_change_that_waits_behind_another_is_not_carried_out_later(
    host, tmp_path, monkeypatch
):
    monkeypatch.setattr(link, "REQUEST_TIME", 1.0)
    stalled, sync = threading.Event(), os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: stalled.wait(20) and sync(file))
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(host.ask, "POST", "/ips", {"ip": VIP})
        until(lambda: host.agent.loop.changes, "it is being written")
        second = clients.submit(host.ask, "POST", "/ips", NEW)
        while not (first.done() and second.done()):
            asked = time.monotonic()
            assert host.ask("GET", "/ips").body == {"ips": []} and time.monotonic() - asked < 0.4
        assert (first.result().status, second.result().status) == (504, 503)
    stalled.set()
    until(lambda: [ip["ip"] for ip in host.ask("GET", "/ips").body["ips"]] == [VIP])
    assert [vip.address for vip in stored(tmp_path)] == ["10.0.0.10"]


def test_changes_of_one_ip_at_once_are_made_one_after_the_other_and_leave_on_disk_what_is_served(host, tmp_path):
    dice, added = random.Random(5), 0
    with ThreadPoolExecutor(16) as clients:
        for _ in range(12):
            calls = [("POST", "/ips", {"ip": VIP}), ("PATCH", MINE, {"healthchecks": [TCP]}), ("DELETE", MINE)] * 4
            answers = [*clients.map(lambda call: host.ask(*call).status, dice.sample(calls, len(calls)))]
            added += answers.count(201)  # none, where it was there and all POST came first
            assert {*answers} <= {200, 201, 204, 404, 409} and added >= 1
            left = [{key: ip[key] for key in ("id", "ip", "checks", "healthcheck_interval")} for ip in host.ips()]
            assert [vip.to_json() for vip in stored(tmp_path)] == left


def test_an_error_of_the_system_in_the_loop_is_answered_500_and_logged_not_taken_for_a_client_that_left(
    host, monkeypatch, caplog
):
    assert host.ask("POST", "/ips", {"ip": VIP}).status == 201
    with monkeypatch.context() as patch:
        patch.setattr(link, "show", lambda *_: (_ for _ in ()).throw(TimeoutError(errno.ETIMEDOUT, "timed out")))
        assert host.ask("GET", MINE)[:2] == (500, {"error": "internal error", "detail": "see the agent's log"})
    assert "in get_ip" in caplog.text and "timed out" in caplog.text
    assert host.ask("GET", MINE).status == 200


def test_a_command_to_a_stuck_loop_is_answered_503_and_not_carried_out_later(host, monkeypatch):
    monkeypatch.setattr(link, "REQUEST_TIME", 0.4)
    with host.stuck():
        assert (host.ask("GET", "/health").status, host.ask("POST", "/ips", {"ip": VIP}).status) == (503, 503)
    assert host.ask("GET", "/ips").body == {"ips": []}


def test_lock_takes_the_ip_and_failover_gives_it_away(tmp_path):
    with Served(tmp_path, "node2", **WITH_ZOOKEEPER) as host:
        ip = host.wait("STANDBY", "node2", "node1")
        assert (ip["holder"], ip["bound"]) == ("node2", False)
        assert host.ask("POST", f"{MINE}/failover").body["error"] == "not the holder"
        assert host.ask("POST", f"{MINE}/lock").status == 204
        ip = host.ask("GET", MINE).body["ip"]
        assert (ip["status"], ip["bound"], ip["hosts"]) == ("ACTIVATED", True, ["node1"])
        assert host.ask("POST", f"{MINE}/lock").status == 204  # it has it already
        assert host.ask("POST", f"{MINE}/failover").body["error"] == "nobody can take it"
        host.agent.loop.post(host.agent.referee.enter, "10.0.0.10", "node2")
        host.wait("ACTIVATED", "node1", "node2")
        assert host.ask("POST", f"{MINE}/failover").status == 204
        assert not host.wait("STANDBY", "node2", "node1")["bound"]


@table("other, change, config, error", [
    ("node2", {"state": "lost"}, {}, "ZooKeeper is out of reach"), ("foreign", {}, {}, "foreign lock"),
    ("node2", {}, {"promise": "at-most-one"}, "at-most-one"), ("node2", {}, ONE_CHECKED, "failing"),
    ("node2", {"obeys": False, "refused": "ZooKeeper refuses multi"}, {}, None),  # with the IP as it is then
])  # fmt: skip
def test_a_lock_that_cannot_be_had_is_refused_with_the_reason(tmp_path, other, change, config, error):
    with Served(tmp_path, other, pool=AtOnce(check=lambda *_: "down"), **{**WITH_ZOOKEEPER, **config}) as host:
        host.wait("FAILING", other) if error == "failing" else host.wait("STANDBY", other, "node1")
        host.agent.loop.post(lambda: vars(host.agent.referee).update(change))
        status, body, _ = host.ask("POST", f"{MINE}/lock")
        if error:
            assert (status, body["error"], bool(body["detail"])) == (409, error, True)
        else:
            assert (status, body["ip"]["ip"], body["ip"]["bound"]) == (504, VIP, False)
            assert body["detail"] == f"{body['ip']['reason']}; ZooKeeper refuses multi"


def test_a_delete_waits_for_the_host_that_waits_for_the_ip(tmp_path):
    with Served(tmp_path, zookeeper="zk:2181") as host:
        host.ask("POST", "/ips", {"ip": VIP})
        host.wait("ACTIVATED", "node1")
        host.agent.loop.post(host.agent.referee.enter, "10.0.0.10", "node2")
        host.wait("ACTIVATED", "node1", "node2")
        began = time.monotonic()
        assert host.ask("DELETE", MINE).status == 204
        assert time.monotonic() - began > 0.9
        assert host.ask("GET", "/ips").body == {"ips": []}


# -- clients that misbehave ----------------------------------------------------


def connections(host: Served, count: int, say: bytes) -> list[socket.socket]:
    made = [socket.create_connection(host.address, 15) for _ in range(count)]
    for connection in made:
        connection.sendall(say)
    return made


def test_a_client_that_sends_a_byte_at_a_time_is_cut_off_and_others_are_served_meanwhile(host, monkeypatch):
    monkeypatch.setattr(link, "REQUEST_TIME", 0.6)
    began = time.monotonic()
    with socket.create_connection(host.address, 0.05) as slow:
        for byte in itertools.cycle(b"GET /ips HTTP/1.1\r\nX: "):
            with contextlib.suppress(TimeoutError):
                slow.send(bytes([byte]))
                if slow.recv(1) == b"":
                    break
            assert host.ask("GET", "/version").status == 200
            assert time.monotonic() - began < 3
    assert time.monotonic() - began > 0.5


def test_four_hundred_half_open_and_thirty_slow_connections_hold_up_nobody(host):
    slow = connections(host, 30, b"POST /ips HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    idle, most, began = connections(host, 200, b""), 0, time.monotonic()
    while time.monotonic() - began < 1.5:
        asked = time.monotonic()
        assert host.ask("GET", "/version").status == 200 and time.monotonic() - asked < 1
        most = max(most, threads("process_request_thread"))
        idle += connections(host, 10, b"GET /ips HTTP/1.1\r\nX: ") if len(idle) < 400 else []
    assert len(idle) == 400 and most <= link.MAX_REQUESTS
    until(lambda: not threads("process_request_thread"), "the threads are gone", 15)
    for connection in (*idle, *slow):
        connection.close()


def test_a_slot_is_given_back_also_where_no_thread_can_be_started(host, tmp_path, monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    until((tmp_path / "session.json").exists, "the thread that writes it has been started")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(link.MAX_REQUESTS + 6):
            with contextlib.suppress(OSError):  # it may be reset
                assert b" 503 " in host.raw(b"GET /version HTTP/1.0\r\n\r\n")
    assert host.ask("GET", "/version").status == 200
    until(lambda: not host.server.clients, "the last one's thread has ended")


@table("status, head", [
    (401, b""), (413, RIGHT), (415, b"Content-Type: a/b\r\n" + RIGHT), (411, b"Transfer-Encoding: chunked\r\n" + RIGHT),
    (403, b"Origin: null\r\n" + RIGHT),
])  # fmt: skip
def test_who_is_refused_gets_to_read_why_though_the_body_was_not_read(guarded, status, head):
    with socket.create_connection(guarded.address, 15) as connection:
        size = 30000 if status == 415 else 1 << 20
        connection.sendall(POST + head + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(16):  # the answer comes meanwhile
            connection.sendall(b" " * (size // 16))
            threading.Event().wait(0.005)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 %d " % status) and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_what_strangers_send_is_logged_escaped_and_bounded(guarded, caplog):
    caplog.set_level("INFO", "link")
    guarded.raw(b"BR\x1b[31mEW /\xff\x07" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n")
    guarded.raw(b"\x1b[2J\r\n\r\n")
    assert "API: BR\\x1b[31mEW '/" in caplog.text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\xff]", caplog.text)
    assert max(map(len, caplog.text.splitlines())) < 700


def test_the_api_is_served_when_it_can_be_and_the_ips_before(tmp_path, caplog):
    caplog.set_level("INFO", "link")
    for listen in ("192.0.2.99:0", "[2001:db8::99]:0"):  # an address that is not there yet
        link.Server(ByHand(tmp_path, listen=listen, user="u", password="p").agent).server_close()
    with socket.create_server(("127.0.0.1", 0)) as taken, Served(tmp_path, **ONE) as host:
        agent = SimpleNamespace(loop=host.agent.loop)
        vars(agent).update({name: getattr(host.agent, name) for name in dir(link.Api) if name[0] != "_"})
        agent.config = config_of(tmp_path, listen=f"127.0.0.1:{taken.getsockname()[1]}")
        threading.Thread(target=link.serve_api, args=(agent, {}), daemon=True).start()
        until(lambda: "Address already in use" in caplog.text)
        taken.close()
        host.address = ("127.0.0.1", int(agent.config.listen[10:]))
        until(lambda: "after all" in caplog.text and host.ask("GET", "/ips").body["ips"])
    assert [record.levelname for record in caplog.records if "API: 1" in record.getMessage()] == ["WARNING"]


def test_a_thousand_ips_are_added_through_the_api_in_seconds_and_no_more_than_max_ips(host):
    began = time.monotonic()
    for number in range(1000):
        assert host.ask("POST", "/ips", {"ip": f"10.2.{number // 250}.{number % 250 + 1}"}).status == 201
    took = time.monotonic() - began
    status, body, _ = host.ask("POST", "/ips", NEW)
    assert status == 409 and "max_ips" in body["detail"] and took < 30  # the target is a benchmark's


@table("say", [b"", b"GE", b"GET /ips HTTP/1.1\r\n\r\n", POST + b"Content-Length: 9\r\n\r\n{"])
def test_a_connection_that_is_reset_leaves_no_trace(host, capfd, caplog, say):
    with host.stuck():
        for connection in connections(host, 5, say):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    until(lambda: not threads("process_request_thread"), "the threads are gone")
    assert host.ask("GET", "/version").status == 200
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# == Story: history, notices, metrics, page, status ============================


def test_the_history_tells_each_change_with_its_cause_and_who_ordered_it_and_outlives_the_process(tmp_path):
    with Served(tmp_path, "node2", **WITH_ZOOKEEPER) as host:
        host.wait("STANDBY", "node2", "node1")
        assert host.ask("POST", f"{MINE}/lock").status == 204
        host.agent.loop.post(host.agent.referee.enter, "10.0.0.10", "node2")
        host.wait("ACTIVATED", "node1", "node2")
        assert host.ask("POST", f"{MINE}/failover").status == 204
        before = host.wait("STANDBY", "node2", "node1")
    told = [[change[key] for key in ("from", "to", "event", "by")] for change in before["history"]]
    assert told == [
        ["FAILING", "STANDBY", "health_check_success", None],
        ["STANDBY", "ACTIVATED", "elected", "lock from 127.0.0.1"],
        ["ACTIVATED", "STANDBY", "demoted", "failover from 127.0.0.1"],
    ]
    last = before["history"][-1]
    assert last["reason"] == "is being handed over" and before["since"] == last["time"][:19] + "Z"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", last["time"])
    with Served(tmp_path, "node2", **WITH_ZOOKEEPER) as host:  # it finds all as it was: no news
        assert host.wait("STANDBY", "node2", "node1")["history"] == before["history"]
    with Served(tmp_path, **WITH_ZOOKEEPER) as host:
        after = host.wait("ACTIVATED", "node1")
        assert [change["to"] for change in after["history"]] == ["STANDBY", "ACTIVATED", "STANDBY", "ACTIVATED"]


def test_a_start_with_a_failing_check_is_told_as_the_change_that_it_is(tmp_path):
    checked = {**ONE_CHECKED, "health_check_fall": 1}
    ByHand(tmp_path, pool=AtOnce(check=lambda *_: ""), **checked).run(1)
    until(lambda: store_in(tmp_path).load_history())
    one = ByHand(tmp_path, pool=AtOnce(check=lambda *_: "down"), **checked)
    one.run(1)
    last = one.agent.get_ip(VIP)["ip"]["history"][-1]
    assert (last["to"], last["event"], last["reason"]) == ("FAILING", "health_check_fail", "down")
    one.run(5)
    assert one.agent.get_ip(VIP)["ip"]["history"][-1] is last


def test_the_last_20_changes_are_kept_a_removed_ip_leaves_none_and_what_cannot_be_read_is_left_out(
    tmp_path, monkeypatch
):
    def change(number: int, old: str = "FAILING") -> dict[str, Any]:
        time, event = f"2026-11-26T02:39:{number:02}.000Z", "elected" if old == "FAILING" else "conflict"
        return {"time": time, "from": old, "to": "STANDBY", "event": event, "reason": number, "by": None}

    def written() -> list[int]:
        store._disk.submit(int).result(5)  # after all before it
        story = store_in(tmp_path).load_history().get("10.0.0.1", link.Story())
        return [each["reason"] for each in story.history]

    store = store_in(tmp_path)
    assert store.load_history() == {}
    stalled = threading.Event()
    store._disk.submit(stalled.wait, 20)
    for number in range(30):
        store.save_change("10.0.0.1", change(number))
    assert store._disk._work_queue.qsize() == 1, "one job for all that waits"
    stalled.set()
    assert written() == [*range(10, 30)]
    with open(tmp_path / "history", "ab") as file:
        file.write(b'\n{}\n["node1", "10.0.0.1", {"time": 5}]\n["node1", "10.0.0.1", []]\n["node1", [], null]\n\xff\n')
        for host, wrong in (("node1", {"time": "2026-11-27"}), ("node1", {"to": "WELL"}), ("node2", {})):
            file.write(json.dumps([host, "10.0.0.1", {**change(50), **wrong}]).encode() + b"\n")
        file.write(json.dumps(["node1", "10.0.0.1", {"time": "2026-11-27T00:00:00Z", "to": "STANDBY"}]).encode())
        file.write(b'\n["node1", "10.')
    store._most = 1  # it is written anew, with what counts
    store.save_change("10.0.0.1", change(30))  # the torn line takes it not along
    store.save_change("10.0.0.2", change(40))
    assert written() == [*range(11, 31)] and len((tmp_path / "history").read_bytes().splitlines()) == 21
    with monkeypatch.context() as patch:  # a moment without room is no end
        patch.setattr(link, "open", lambda *_, **__: (_ for _ in ()).throw(OSError()), raising=False)
        store.save_change("10.0.0.1", change(31))
        store._disk.submit(int).result(5)
    store.save_change("10.0.0.1", change(32))
    assert written()[-3:] == [30, 31, 32]
    for number in range(33, 60):  # of what leaves the state as it is only the last: no change is forgotten for it
        store.save_change("10.0.0.1", change(number, old="STANDBY"))
    assert written()[-3:] == [31, 32, 59]
    assert store_in(tmp_path).load_history()["10.0.0.1"].since == "2026-11-26T02:39:32Z"
    store.save_change("10.0.0.1", None)
    assert written() == []


def test_who_waits_for_the_session_to_be_written_waits_for_the_history_that_was_told_before(tmp_path, monkeypatch):
    """The process ends then; its last change may have come after a session that the disk has yet to begin with."""
    monkeypatch.setattr(link, "TICK", 0.05)
    store, busy, slow = store_in(tmp_path), threading.Event(), threading.Event()
    monkeypatch.setattr(store, "_write_changes", lambda: slow.wait(5))
    store._disk.submit(busy.wait)
    store.save_session({})
    store.save_change("10.0.0.1", None)
    busy.set()
    assert not store.save_session({}, now=True)
    slow.set()
    until(lambda: store.save_session({}, now=True))


class Hooked:
    """Notices of an agent, without one: `told` is what the loop was told."""

    def __init__(self, target: object) -> None:
        self.notices = link.Notices(str(target), lambda function, *args: function(*args))

    def tell(self, *numbers: int) -> None:
        for number in numbers:
            self.notices.tell(
                {"host": "node1", "ip": f"10.0.0.{number}", "from": "STANDBY", "to": "ACTIVATED", "by": None}
            )
        until(lambda: not self.notices.waiting)


def test_a_program_is_called_for_each_change_in_order_with_nothing_of_the_agents_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("LINK_PASSWORD", "secret")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/secret")
    hook, out = tmp_path / "hook", tmp_path / "out"
    hook.write_text(f'#!/bin/sh\n{{ cat; echo " $LINK_IP $LINK_TO [$LINK_BY]"; env | grep -i secret || :; }} >>{out}\n')
    hook.chmod(0o755)
    hooked = Hooked(hook)
    hooked.tell(1, 2, 3)
    lines = out.read_text().splitlines()
    assert [json.loads(line.rpartition("} ")[0] + "}")["ip"] for line in lines] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert lines[0].endswith(" 10.0.0.1 ACTIVATED []")
    assert (hooked.notices.sent, hooked.notices.lost, hooked.notices.trouble) == (3, 0, "")


@table(
    "script, said", [("exit 3", "exit code 3"), ("sleep 60 & sleep 60", "not done in 0.2 s"), (None, "No such file")]
)
def test_a_program_that_fails_hangs_or_is_not_there_is_said_and_holds_nobody_up(
    tmp_path, monkeypatch, caplog, script, said
):
    monkeypatch.setattr(link, "LONG", 0.4)
    hook = tmp_path / "hook"
    if script:
        hook.write_text(f"#!/bin/sh\n{script}\n")
        hook.chmod(0o755)
    hooked = Hooked(hook)
    hooked.tell(1, 2)
    assert said in hooked.notices.trouble and (hooked.notices.sent, hooked.notices.lost) == (0, 2)
    assert caplog.text.count("on_change: ") == 1
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    monkeypatch.setattr(link, "LONG", 10.0)
    hooked.tell(3)
    assert (hooked.notices.trouble, hooked.notices.sent) == ("", 1)


def test_a_reload_that_is_asked_for_while_the_configuration_is_read_ends_no_agent(tmp_path):
    file = tmp_path / "link.yml"
    os.mkfifo(file)
    command = [sys.executable, link.__file__, "--check", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as agent:
        with file.open("w") as reads:  # it does, once this is open
            agent.send_signal(signal.SIGHUP)
            reads.write(json.dumps({"interface": "lo", "state_dir": str(tmp_path)}))
        said = agent.communicate(timeout=20)[0]
    assert agent.returncode == 0 and "configuration OK" in said, said


def test_a_check_says_that_all_is_right_also_where_its_warnings_cannot_be_written():
    """As where the log's disk is full: a reload waits for that word."""
    environ = {**os.environ, "LINK_FOO": "1"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, link.__file__, "--check", "--interface", "lo"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, env=environ, check=True)
    assert done.stdout.endswith(link.CHECKED)


def test_status_finds_the_port_of_an_ipv6_address_that_names_none(capsys):
    assert link.main(["status", "--url", "http://[::1]"]) == 2
    assert "Name or service" not in capsys.readouterr().err


def test_a_program_under_way_ends_with_the_agent_and_none_begins_after_it(tmp_path):
    """Else the next change's program would be begun as the last thing before the exit, and be nobody's."""
    hook, file = tmp_path / "hook", tmp_path / "pid"
    hook.write_text(f"#!/bin/sh\n[ -e {file} ] && exit; echo $$ >{file}.new; mv {file}.new {file}; sleep 60\n")
    hook.chmod(0o755)
    hooked = Hooked(hook)
    hooked.notices.tell({"ip": "10.0.0.1"})
    hooked.notices.tell({"ip": "10.0.0.2"})
    until(lambda: file.exists() and hooked.notices._child)
    hooked.notices.end()
    assert not Path(f"/proc/{file.read_text().strip()}").exists(), "nor is it a zombie of the next program"
    hooked.notices.tell({"ip": "10.0.0.3"})
    hooked.notices._pool.shutdown()  # all that has begun is over
    assert "exit code -9" in hooked.notices.trouble
    assert (hooked.notices.sent, hooked.notices.lost) == (0, 1)


def test_a_story_that_grows_while_another_thread_reads_it_is_told_as_it_was():
    """GET /metrics is written by the thread that serves it."""

    class Read(dict):
        def __getitem__(self, key):
            story.history.append({})
            return super().__getitem__(key)

    story = link.Story(began="then")
    story.history.extend(Read({"from": "STANDBY", "to": "STANDBY"}) for _ in range(2))
    assert story.since == "then"


@contextlib.contextmanager
def web(*answers: int, elsewhere: str = "") -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """A server that answers one POST after the other like that: its address, and what it got."""
    left, got = iter(answers), list[tuple[str, str, str]]()

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, self.headers["Content-Type"], body["ip"]))
            self.send_response(next(left))
            self.send_header("Location", elsewhere)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


def test_a_url_gets_each_change_in_order_and_is_tried_three_times(monkeypatch, caplog):
    monkeypatch.setattr(link, "TICK", 0.01)
    with web(500, 503, 200, 200, 404, 404, 404, 201) as (address, got):
        hooked = Hooked(f"{address}/in?token=secret")
        hooked.tell(1, 2)
        assert (hooked.notices.sent, hooked.notices.lost) == (2, 0)
        hooked.tell(3)
        assert "404" in hooked.notices.trouble and (hooked.notices.sent, hooked.notices.lost) == (2, 1)
        hooked.tell(4)
    assert [ip[-1] for _, _, ip in got] == ["1", "1", "1", "2", "3", "3", "3", "4"]
    assert {each[:2] for each in got} == {("/in?token=secret", "application/json")}
    assert hooked.notices.trouble == "" and "secret" not in caplog.text


def test_a_url_that_sends_elsewhere_has_not_been_told(monkeypatch):
    monkeypatch.setattr(link, "TICK", 0.01)
    with web(301, 301, 301, elsewhere="/login") as (address, _):
        hooked = Hooked(f"{address}/in")
        hooked.tell(1)
    assert hooked.notices.lost == 1 and "elsewhere" in hooked.notices.trouble


def test_changes_that_nobody_takes_are_dropped_and_counted_and_told_in_health(tmp_path, monkeypatch):
    monkeypatch.setattr(link.Notices, "MOST", 1)
    monkeypatch.setattr(link.Notices, "_work", lambda *_: None)
    one = ByHand(tmp_path, **WITH_ZOOKEEPER, on_change="/hook")
    one.run(2)
    assert one.agent.notices.lost == 1 and one.agent.busy()
    assert one.agent.health()["on_change"] in one.agent.health()["trouble"] and one.agent.health()["healthy"]


@table("target, why", [
    ("hook", "whole path"), ("ftp://h/", "whole path"), ("http:///x", "whole path"), ("http://h:99999/", "range"),
    ("http://u:secret@h/", "no user"), ("http://h/?token=secret x", "space"),
])  # fmt: skip
def test_an_on_change_that_is_neither_url_nor_path_is_refused(tmp_path, target, why):
    with pytest.raises(link.ConfigError, match=f"^on_change: .*{why}") as error:
        config_of(tmp_path, on_change=target)
    assert "secret" not in str(error.value)


def test_metrics_are_what_prometheus_reads_and_say_what_the_api_says(tmp_path):
    checks = [{**TCP, "host": "a-host.example"}]
    with Served(tmp_path, "node2", pool=AtOnce(check=lambda *_: ""), **WITH_ZOOKEEPER) as host:
        host.wait("STANDBY", "node2", "node1")
        host.ask("POST", "/ips", {"ip": "fd77::99", "checks": checks})
        assert host.ask("POST", f"{MINE}/lock").status == 204
        answer = host.ask("GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {each.name: each for each in text_string_to_metric_families(answer.body)}
    assert families.keys() == {name.removesuffix("_total") for name in METRICS}
    assert all(each.documentation for each in families.values())
    counters = {f"{each.name}_total" for each in families.values() if each.type == "counter"}
    assert counters == {name for name in METRICS if name.endswith("_total")}

    def value(name: str, **labels: str) -> float:
        return next(each.value for each in families[name].samples if labels.items() <= each.labels.items())

    assert value("link_ip_bound", ip="10.0.0.10") == value("link_ip_status", ip="10.0.0.10", status="ACTIVATED") == 1
    assert value("link_ip_transitions", ip="10.0.0.10", event="elected") == 1
    assert value("link_ip_check_ok", ip="fd77::99", check="TCP a-host.example:1") == 1
    assert not {"nan", "inf", "NaN", "+Inf"} & {*answer.body.split()}
    assert value("link_zookeeper_state", state="connected") == value("link_healthy") == 1
    assert abs(value("link_ip_since_timestamp_seconds", ip="10.0.0.10") - time.time()) < 30


def test_the_gap_of_a_move_is_the_time_since_it_was_last_heard_elsewhere():
    story = link.Story()
    story.moved(link.WireView(heard=math.inf), 3)
    assert story.gaps == {}
    story.moved(link.WireView(heard=0.02), 3)
    story.moved(link.WireView(heard=0.12, unanswered=3), 3)
    assert story.gaps == {"planned": 0.02, "unplanned": 0.12}
    story.moved(link.WireView(heard=4.0), 3)
    assert story.gaps == {"planned": 0.02, "unplanned": 4.0}


def test_a_browser_gets_a_page_that_may_load_nothing_and_curl_gets_the_links(host):
    page = host.ask("GET", "/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.headers["Content-Type"] == "text/html; charset=utf-8" and page.body == link.PAGE
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=|innerHTML|insertAdjacentHTML|document\.write", link.PAGE)
    assert link.PAGE.count("\n") < 80
    for path in host.ask("GET", "/").body["links"]:
        assert host.ask("GET", path).status == 200


@table("origin, status", [("http://{own}", 404), ("http://evil.example", 403), ("http://127.0.0.1", 403),
                          ("https://{own}", 403), ("null", 403)])  # fmt: skip
def test_orders_of_a_page_are_heeded_from_the_agents_own_alone(host, origin, status):
    own = f"127.0.0.1:{host.address[1]}"
    assert host.ask("POST", f"{MINE}/lock", headers={"Origin": origin.format(own=own)}).status == status


def test_status_prints_the_table_and_its_exit_code_says_whether_all_is_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(link, "TICK", 0.01)
    access = {"user": "link", "password": "a:b@c/d"}
    with Served(tmp_path, "node2", **WITH_ZOOKEEPER, **access) as host:
        url = f"http://link:a%3Ab%40c%2Fd@127.0.0.1:{host.address[1]}"
        until(lambda: host.agent.vips["10.0.0.10"].state is State.STANDBY)
        assert link.main(["status", "--url", url]) == 0
        head, line, end = capsys.readouterr().out.splitlines()
        assert line.split()[:4] == [VIP, "node2", "node2,node1", "STANDBY"] and end == "all is well"
        assert head.split() == ["IP", "HOLDER", "QUEUE", "HERE", "SINCE", "WHY"]
        host.network.link = host.network.link._replace(up=False, trouble="eth0 is down")
        host.agent.loop.post(lambda: None)
        until(lambda: host.agent.vips["10.0.0.10"].state is State.FAILING)
        assert link.main(["status", "--url", url + "/"]) == 1
        out = capsys.readouterr().out
        assert "\nnode1: eth0 is down\n" in out and f"\n{VIP} is FAILING here: " in out
        assert link.main(["status", "--url", url.replace("link:", "x:")]) == 2
        config = tmp_path / "link.yml"
        config.write_text(json.dumps({"interface": "eth0", "listen": f"127.0.0.1:{host.address[1]}", **access}))
        assert link.main(["status", "--config", str(config)]) == 1
    capsys.readouterr()
    assert link.main(["status", "--url", url]) == 2
    assert "refused" in capsys.readouterr().err
    for answer in ({"error": "busy"}, {"hostname": "node1"}, [], None):  # an agent of another version, or none
        said = io.StringIO(json.dumps(answer) if answer is not None else "<html>")
        monkeypatch.setattr(http.client.HTTPConnection, "request", lambda *_, **__: None)
        monkeypatch.setattr(http.client.HTTPConnection, "getresponse", lambda _, said=said: said)
        assert link.main(["status", "--url", url]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_status_knows_an_ip_that_is_nobodys_or_on_two_hosts():
    def ip(holder: str | None, mac: str | None, bound: bool, silent: bool = False) -> dict[str, Any]:
        wire = {"state": "answered" if mac else "silent" if silent else "looking", "mac": mac}
        return {"ip": VIP, "holder": holder, "hosts": [], "wire": wire, "bound": bound, "status": "STANDBY",
                "since": "", "reason": ""}  # fmt: skip

    for args, said in {
        (None, None, False): "nobody's", ("node1", "02:01", True): "two hosts: here and at 02:01",
        (None, "02:01", False): "", ("node2", None, False): "", ("node2", None, True, True): "",
        ("node2", None, False, True): "nobody's: node2 has the lock, and nobody answers",
    }.items():  # fmt: skip
        wrong = link.read_status([ip(*args)])[1]
        assert said in "".join(wrong) and bool(wrong) is bool(said)
