"""Tests of LinK. Run them by `./start.sh test`; the sections mirror link.py's.

This part needs no privileges: the table, every cell of the decision's space, configuration, frames, files, and the
HTTP API over a real socket in front of an agent whose network and ZooKeeper are make-believe.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import enum
import errno
import fcntl
import functools
import http.client
import inspect
import ipaddress
import itertools
import json
import math
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import link
from link import Decision, Event, Facts, HealthCheck, Intent, Invalid, Lock, State, VirtualIP, Wire, make_config

HERE = Path(__file__).parent
SOURCE = HERE / "link.py"
MAC, OTHER_MAC = bytes.fromhex("020000000a01"), bytes.fromhex("020000000a02")
VIP, VIP6 = "10.0.0.10/32", "fd77::100/128"
table = functools.partial(pytest.mark.parametrize, ids=lambda value: repr(value)[:50])


def until(condition: Callable[[], Any], what: str = "", timeout: float = 5.0) -> Any:
    """The condition's value as soon as it is true; fails after the timeout."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or inspect.getsource(condition)}"
        pause.wait(0.002)
    return value


def readme_table(header: str) -> list[list[str]]:
    """The rows below this header in README.md, without markup."""
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(header) + 2 :])
    return [[re.sub(r"[`*]", "", cell).strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


################################################################################
# The file itself
################################################################################

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


def test_functions_are_short():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    lengths = sorted((f.end_lineno or 0) - f.lineno + 1 for f in functions)
    assert statistics.median(lengths) <= 10 and lengths[int(len(lengths) * 0.9)] <= 25 and lengths[-1] <= 45


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


@table("library, part", [("scapy", "Frames"), ("pyroute2", "Network"), ("kazoo", "Coordinator"), ("yaml", "Config")])
def test_each_library_is_named_in_one_part_only_and_never_scapy_all(library, part):
    banner, users = "#" * 80, {}
    for piece in SOURCE.read_text(encoding="utf-8").split(f"\n{banner}\n# ")[1:]:
        title, _, body = piece.partition(f"\n{banner}\n")
        if names := re.findall(rf"^\s*(?:from|import) ({library}\S*)", body, re.MULTILINE):
            users[title] = names
    (title,) = users
    assert title.startswith(part) and "scapy.all" not in users[title]


################################################################################
# State machine
################################################################################

COLUMNS = ["fault", "elected", "demoted", "health_check_fail", "health_check_success"]
MATRIX = {
    "STANDBY": ["ACTIVATED", "ACTIVATED", "STANDBY", "FAILING", "STANDBY"],
    "ACTIVATED": ["ACTIVATED", "ACTIVATED", "STANDBY", "FAILING", "ACTIVATED"],
    "FAILING": ["FAILING", "FAILING", "FAILING", "FAILING", "STANDBY"],
}


def test_the_table_is_the_specification_and_total():
    assert {state.value: [link.step(state, Event(column)).value for column in COLUMNS] for state in State} == MATRIX
    assert set(link.TRANSITIONS) == set(itertools.product(State, Event))


def test_the_docstring_shows_the_table():
    lines = [line.split() for line in (link.__doc__ or "").splitlines()]
    start = lines.index(COLUMNS)
    assert {row[0]: row[1:] for row in lines[start + 1 : start + 4]} == MATRIX


def test_the_readme_shows_the_table():
    assert {row[0]: row[1:] for row in readme_table("| state | " + " | ".join(COLUMNS) + " |")} == MATRIX


################################################################################
# Decision: every cell of State x Facts
################################################################################


class Cell(NamedTuple):
    """A state and facts; the events that decide() asks for one after the other; where that ends."""

    old: State
    facts: Facts
    events: tuple[Event, ...]
    new: State
    decision: Decision


def settle(old: State, facts: Facts) -> Cell:
    new, events = old, []
    while (decision := link.decide(new, facts)).event and len(events) <= 4:
        events.append(decision.event)
        new = link.step(new, decision.event)
    return Cell(old, facts, tuple(events), new, decision)


@functools.cache
def every_cell() -> tuple[Cell, ...]:
    policies = next(option for option in link.OPTIONS if option.name == "on_fault").metadata["choices"]
    domains = [
        (False, True) if kind is bool else tuple(kind) if issubclass(kind, enum.Enum) else policies
        for kind in typing.get_type_hints(Facts).values()
    ]
    return tuple(settle(state, Facts(*values)) for state, *values in itertools.product(State, *domains))


def settled(at_most_one: bool = False) -> Iterator[Cell]:
    """The cells of one promise that come to rest (that all do is a test of its own)."""
    return (c for c in every_cell() if c.facts.at_most_one is at_most_one and c.decision.event is None)


def relieved(f: Facts) -> bool:
    """Another host is heard, and has the lock or is given it; or has it past the limit and the wire cannot tell."""
    goes = f.lock is Lock.MINE and f.intent is not Intent.RUN
    late = f.lock is Lock.OTHER and f.overdue and f.wire is Wire.BLIND
    return late or ((f.lock is Lock.OTHER or goes) and f.wire is Wire.ANSWERED)


def claims(f: Facts) -> bool:
    """The operator rather wants two holders than none while ZooKeeper is away."""
    return f.on_fault == "claim" and f.lock is Lock.UNKNOWN and f.healthy


def yields(f: Facts) -> bool:
    """Bound without a lock, against the better claim of a rival on the wire."""
    return f.outranked and f.bound and f.lock is not Lock.MINE and not claims(f)


def test_every_decision_comes_to_rest_says_why_and_asks_for_no_event_in_vain():
    assert len({(c.old, c.facts) for c in every_cell()}) >= 3 * 5 * 4 * 4 * 3 * 2**8
    for c in every_cell():
        assert c.decision.event is None and len(c.events) <= 4 and c.decision.reason, c
        states = [*itertools.accumulate(c.events, link.step, initial=c.old)]
        assert all(one is not next_ for one, next_ in itertools.pairwise(states)), c


def test_health_alone_decides_who_is_failing():
    for c in (*settled(), *settled(at_most_one=True)):
        assert (c.new is State.FAILING) is (not c.facts.healthy), c


def test_elected_means_that_the_lock_is_ours_and_demoted_that_another_host_is_better():
    for _, f, events, *rest in settled():
        assert Event.ELECTED not in events or f.lock is Lock.MINE, (f, events, rest)
        gone = f.wire is Wire.ANSWERED and not f.bound and f.lock is not Lock.MINE
        better = f.lock is Lock.OTHER or relieved(f) or yields(f) or gone
        assert Event.DEMOTED not in events or better, (f, events, rest)


def test_fault_means_that_zookeeper_is_away_and_nobody_is_heard_to_have_the_ip():
    for _, f, events, *rest in settled():
        if Event.FAULT in events:
            assert f.lock is Lock.UNKNOWN or (f.lock is Lock.WAITING and f.accused), (f, events, rest)
            assert f.wire in (Wire.SILENT, Wire.BLIND) or (claims(f) and f.wire is not Wire.LOOKING), (f, events, rest)


def test_a_bound_address_is_let_go_only_to_another_host_or_by_a_delete():
    for old, f, _, _, d in settled():
        if f.bound and not d.wanted:
            assert relieved(f) or yields(f) or f.intent is Intent.DELETE, (old, f, d)


def test_a_silent_address_stays_bound_whatever_is_asked_but_its_deletion():
    for old, f, _, _, d in settled():
        if f.bound and f.wire is Wire.SILENT and not yields(f) and f.intent is not Intent.DELETE:
            assert d.wanted, (old, f, d)


def test_a_relieved_host_lets_go_and_without_a_lock_the_better_claim_is_yielded_to():
    for old, f, _, new, d in settled():
        if relieved(f) or (yields(f) and f.intent is not Intent.DELETE):
            assert not d.wanted, (old, f, d)
            assert new is not State.ACTIVATED or f.intent is Intent.DELETE, (old, f, d)


def test_what_somebody_answers_for_is_taken_only_with_the_lock_or_by_a_claim_without_zookeeper():
    for old, f, _, _, d in settled():
        if d.wanted and not f.bound and f.wire is Wire.ANSWERED:
            assert f.lock is Lock.MINE or claims(f), (old, f, d)


def test_nothing_new_is_taken_before_the_look_is_over_but_with_the_lock():
    for old, f, _, _, d in settled():
        if d.wanted and not f.bound and f.wire is Wire.LOOKING:
            assert f.lock is Lock.MINE or old is State.ACTIVATED, (old, f, d)  # ACTIVATED: was removed by hand


def test_what_zookeeper_gave_to_another_host_is_never_taken():
    for old, f, _, _, d in (*settled(), *settled(at_most_one=True)):
        if f.lock is Lock.OTHER and not f.bound:
            assert not d.wanted, (old, f, d)


def test_hold_takes_nothing_new_without_zookeeper():
    for old, f, _, _, d in settled():
        away = f.on_fault == "hold" and f.lock in (Lock.UNKNOWN, Lock.WAITING)
        if away and not f.bound and old is not State.ACTIVATED:
            assert not d.wanted, (old, f, d)


def test_who_is_asked_to_go_takes_nothing_new():
    for old, f, _, _, d in settled():
        if f.intent is not Intent.RUN and not f.bound and old is not State.ACTIVATED:
            assert not d.wanted, (old, f, d)


def test_exactly_the_healthy_hosts_that_are_to_run_contend():
    for old, f, _, _, d in settled():
        assert d.contend is (f.healthy and f.intent is Intent.RUN), (old, f, d)


def doubts(f: Facts) -> bool:
    """Perhaps about to fail, and the IP may be served elsewhere: no reason yet to move it here."""
    return f.doubtful and f.wire in (Wire.ANSWERED, Wire.LOOKING) and not f.bound and not f.at_most_one


def test_a_host_that_doubts_its_health_leaves_an_ip_that_is_served_where_it_is():
    for old, f, events, new, d in settled():
        if doubts(f) and f.lock is Lock.MINE and f.healthy and f.intent is Intent.RUN and old is not State.ACTIVATED:
            assert new is State.STANDBY and not events[1:] and d.contend and not d.wanted, (old, f, d)


def test_a_healthy_running_holder_of_a_confirmed_lock_has_the_address():
    for old, f, _, new, d in (*settled(), *settled(at_most_one=True)):
        if f.lock is Lock.MINE and f.healthy and f.intent is Intent.RUN and (not doubts(f) or old is State.ACTIVATED):
            assert d.wanted and d.contend and new is State.ACTIVATED, (old, f, d)


def test_without_zookeeper_a_healthy_host_takes_what_nobody_answers_for():
    for old, f, _, new, d in settled():
        alone = f.healthy and f.intent is Intent.RUN and f.lock is Lock.UNKNOWN and not yields(f)
        unheard = f.wire in (Wire.SILENT, Wire.BLIND) and f.on_fault != "hold"
        if alone and (unheard or (claims(f) and f.wire is Wire.ANSWERED)):
            assert d.wanted and new is State.ACTIVATED, (old, f, d)


def test_a_failing_host_takes_an_address_exactly_when_it_is_an_orphan():
    for old, f, _, _, d in settled():
        if not f.healthy and not f.bound:
            orphan = f.lock is Lock.NOBODY or (f.lock is Lock.UNKNOWN and f.on_fault != "hold")
            assert d.wanted is (orphan and f.wire is Wire.SILENT and f.intent is Intent.RUN), (old, f, d)


def test_a_running_standby_and_nobody_else_accuses_a_holder_that_fell_silent():
    for old, f, _, new, d in (*settled(), *settled(at_most_one=True)):
        may = f.accused and f.lock is Lock.OTHER and f.intent is Intent.RUN and not f.at_most_one
        assert d.accuse is (may and new is State.STANDBY), (old, f, d)


def test_a_deleted_address_waits_for_a_successor_but_not_for_long_and_is_never_bound_anew():
    for old, f, _, _, d in settled():
        if f.intent is Intent.DELETE:
            somebody = f.lock is Lock.WAITING or (f.successor and f.lock in (Lock.MINE, Lock.OTHER))
            assert d.wanted is (f.bound and somebody and not f.overdue and not relieved(f)), (old, f, d)


def test_at_most_one_has_the_address_exactly_while_healthy_and_running_with_a_confirmed_lock():
    for old, f, events, new, d in settled(at_most_one=True):
        right = f.lock is Lock.MINE and f.healthy and f.intent is Intent.RUN
        assert d.wanted is right is (new is State.ACTIVATED) and Event.FAULT not in events, (old, f, d)


def test_at_most_one_leaves_the_queue_only_after_the_address_is_gone():
    for old, f, _, _, d in settled(at_most_one=True):
        assert d.contend is (f.bound or (f.healthy and f.intent is Intent.RUN)), (old, f, d)


################################################################################
# Addresses and checks
################################################################################

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
        link.parse_address(text)
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


def test_a_virtual_ip_is_stored_and_read_back_unchanged():
    checks = [{**RIGHT_CHECK, "host": "::1", "path": "/ok?x=1"}, {"type": "tcp", "host": "h", "port": 65535}]
    vip = VirtualIP.parse({"id": "vip-1", "ip": "fd77::100", "checks": checks, "healthcheck_interval": 3600}, 5)
    assert VirtualIP.parse(vip.to_json(), 7) == vip
    assert vip.to_json()["checks"][1] == {"type": "TCP", "host": "h", "port": 65535, "path": "/"}
    assert VirtualIP.parse({"ip": "10.0.0.10"}, 7).healthcheck_interval == 7


################################################################################
# Configuration
################################################################################


@table("depth, wanted", [*enumerate([("/var/lib/link", 1000), ("file", 7), ("environment", 8), ("flag", 9)])])
def test_flags_beat_the_environment_beats_the_file_beats_the_default(tmp_path, monkeypatch, depth, wanted):
    path = tmp_path / "link.yml"
    path.write_text("interface: eth0\n" + ("state_dir: file\nmax_ips: 7\n" if depth > 0 else ""))
    for key, value in {"LINK_STATE_DIR": "environment", "LINK_MAX_IPS": "8"}.items() if depth > 1 else ():
        monkeypatch.setenv(key, value)
    config, check = link.load(["--config", str(path), *(["--state-dir", "flag", "--max-ips=9"] if depth > 2 else [])])
    assert (config.state_dir, config.max_ips, check) == (*wanted, False)


def test_the_environment_can_hold_lists_and_secrets():
    environ = {"LINK_IPS": '[{"ip": "10.0.0.10"}]', "LINK_USER": "u", "LINK_PASSWORD": "1234", "LINK_LISTEN": "[::]:80"}
    config = make_config({"interface": "eth0"}, environ, {})
    assert [str(vip.ip) for vip in config.virtual_ips] == [VIP]
    assert (config.password, config.listen_address) == ("1234", ("::", 80))
    assert config.virtual_ips == make_config({"interface": "eth0"}, environ, {}).virtual_ips  # the ids, too


BAD_VALUES: dict[str, list[tuple[Any, str]]] = {  # key: value, or several keys; a word of the remedy
    "interface": [("", "required"), ("eth0/1", "not an interface name"), ("a" * 16, "not an interface name")],
    "hostname": [("node 1", "not a host name"), ("..", "not a host name")],
    "zookeeper": [(text, "host:port") for text in ("zk1", "zk1:2181,,zk2:2181", "zk1:99999", "zk1:0/x", "z:1 /x")]
    + [({wrong[0]: wrong[1]}, "set it, or") for wrong in (("probe_count", 0), ("on_fault", "hold"))],
    "zookeeper_root": [(text, "absolute path") for text in ("link", "/", "/a/../b", "/a/")],
    "zookeeper_auth": [("secret", "user:password")],
    "zookeeper_tls_cert": [("c.pem", "zookeeper_tls_key")],
    "session_timeout": [
        (0, "use 1 "), ("soon", "number"), (True, "number"), (math.nan, "range"), (math.inf, "range"),
        ({"promise": "at-most-one", "zookeeper": "z:2181", "session_timeout": 1.5}, "2 s or more"),
    ],
    "listen": [(text, "e.g. 127.0.0.1:1313") for text in ("1313", ":1313", "127.0.0.1:x", "127.0.0.1:65536", "a b:1")],
    "user": [("admin", "password"), ({"listen": "0.0.0.0:1313"}, "required")],
    "password": [("secret", "needs user")],
    "tls_cert": [("c.pem", "tls_key")],
    "health_check_interval": [(0, "use 1 "), (3601, "3600"), (1.5, "whole number"), ("x", "whole number")],
    "health_check_timeout": [(0, "use 0.1 ")],
    "health_check_fall": [(0, "use 1 ")],
    "health_check_rise": [(0, "use 1 ")],
    "probe_interval": [(0.001, "use 0.005 "), ({"probe_interval": 2, "session_timeout": 4}, "lower one")],
    "probe_count": [(-1, "use 0 "), (1, "2 or more")],
    "witnesses": [(["gateway"], "address"), ("gateway", "list")],
    "on_fault": [("panic", "probe, claim, hold")],
    "promise": [("two", "at-least-one, at-most-one"), ("at-most-one", "set zookeeper")],
    "handover_timeout": [(10, "lower it"), (0, "use 0.1 ")],
    "stop_timeout": [(0, "use 1 ")],
    "announce_count": [(0, "use 1 ")],
    "announce_interval": [(-1, "use 0 ")],
    "max_ips": [(0, "use 1 ")],
    "ips": [
        ({"max_ips": 1, "ips": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}, "raise max_ips"),
        ({"ips": {"ip": "10.0.0.1"}}, "list"), (["10.0.0.1"], "object"), ([{"ip": "10.0.0.0/8"}], "network address"),
        ([{"ip": "10.0.0.1", "colour": 1}], "'colour'"), ([{"ip": "10.0.0.1", "id": 5}], "id"),
        ([{"ip": "10.0.0.1"}, {"ip": "10.0.0.1/24"}], "remove one"),
    ],
    "log_level": [("LOUD", "DEBUG, INFO, WARNING, ERROR")],
    "log_format": [("xml", "text, json")],
}  # fmt: skip


@table("key, value, remedy", [(key, *row) for key, rows in BAD_VALUES.items() for row in rows])
def test_a_wrong_value_is_refused_naming_the_key_and_the_remedy(key, value, remedy):
    with pytest.raises(link.ConfigError) as error:
        make_config({"interface": "eth0", **(value if isinstance(value, dict) else {key: value})}, {}, {})
    assert str(error.value).startswith(f"{key}: ") and remedy in str(error.value)
    assert "secret" not in str(error.value)


def test_a_certificate_that_is_none_is_refused_by_check(tmp_path):
    (tmp_path / "c.pem").write_text("interface: eth0")
    files = {"tls_cert": str(tmp_path / "c.pem"), "tls_key": str(tmp_path / "c.pem")}
    with pytest.raises(link.ConfigError, match=r"^tls_cert: .*c\.pem"):
        make_config({"interface": "eth0", **files}, {}, {})


BAD_FILES = {
    b"interfaces: eth0": "unknown key 'interfaces'; see link.py --help", b"1: eth0": "unknown key 1",
    b"- interface": "mapping", b"eth0": "mapping", b"interface: [": "not valid YAML",
    b"interface: !!python/object:os.system {}": "not valid YAML", b"interface: \xff": "cannot be read",
    None: "cannot be read",
}  # fmt: skip


@table("content, why", BAD_FILES.items())
def test_a_file_that_cannot_be_used_is_refused_with_its_name(tmp_path, content, why):
    path = tmp_path / "link.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(link.ConfigError) as error:
        link.read_config(str(path))
    assert str(path) in str(error.value) and why in str(error.value)


def test_an_empty_file_is_a_configuration_of_defaults(tmp_path):
    (tmp_path / "link.yml").write_text("# nothing yet\n")
    assert link.read_config(str(tmp_path / "link.yml")) == {}


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


################################################################################
# Frames
################################################################################

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
}
HEX = {name: bytes.fromhex(text) for name, text in FRAMES.items()}


@table(
    "address, own, names",
    [
        ("10.0.0.10", {4: "10.0.0.1"}, ["request", "reply", "probe", "probe"]),
        ("fd77::100", {6: "fe80::1"}, ["NA", "NS to all", "NS to one"]),
        ("fd77::100", {}, ["NA", "anonymous NS", "anonymous NS"]),
    ],
)
def test_frames_are_right_byte_for_byte(address, own, names):
    frames = link.build_frames(ipaddress.ip_address(address), MAC, own)
    assert [*frames.announce, frames.ask_all, frames.ask_one] == [HEX[name] for name in names]


ARP, NS = {"hwsrc": "02:00:00:00:0a:01", "pdst": "10.0.0.10"}, {"tgt": "fd77::100", "hlim": 255}
MEANT: dict[str, dict[str, Any]] = {
    "request": {**ARP, "op": 1, "psrc": "10.0.0.10"}, "reply": {**ARP, "op": 2, "psrc": "10.0.0.10"},
    "probe": {**ARP, "op": 1, "psrc": "0.0.0.0"}, "NA": {**NS, "R": 0, "S": 0, "O": 1, "lladdr": "02:00:00:00:0a:01"},
    "NS to all": {**NS, "lladdr": "02:00:00:00:0a:01"}, "NS to one": NS, "anonymous NS": NS,
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


@table(
    "frame, address, asks, broadcast",
    [
        (from_other("request"), "10.0.0.10", False, True),
        (from_other("request", 38, b"\x0a\0\0\x63"), "10.0.0.10", False, True),  # asks for another address
        (from_other("reply"), "10.0.0.10", False, True),
        (from_other("reply", to=MAC), "10.0.0.10", False, False),
        (from_other("probe"), "10.0.0.10", True, True),
        (from_other("probe", to=MAC) + bytes(18), "10.0.0.10", True, False),  # padded to 60 bytes
        (from_other("NA"), "fd77::100", False, True),
        (from_other("NA", to=MAC), "fd77::100", False, False),
        (from_other("NS to all"), "fd77::100", True, True),
        (from_other("anonymous NS"), "fd77::100", True, True),
    ],
)
def test_a_frame_tells_who_has_or_asks_for_an_address(frame, address, asks, broadcast):
    got = link.read_frame(frame)
    assert got and (got.address, got.mac, got.asks, got.broadcast) == (address, OTHER_MAC, asks, broadcast)


NOTHING = {
    "empty": b"", "cut off": HEX["probe"][:-1], "a reply from 0.0.0.0": from_other("probe", 20, b"\0\2"),
    "not Ethernet": from_other("probe", 14, b"\0\6"), "IPv4": from_other("probe", 12, b"\x08\0"),
    "a VLAN": from_other("probe", 12, b"\x81\0"), "cut off NA": HEX["NA"][:77], "UDP": from_other("NA", 20, b"\x11"),
    "an echo": from_other("NA", 54, b"\x80"), "through a router (RFC 4861, 7.1)": from_other("NA", 21, b"\xfe"),
}  # fmt: skip


@table("what", NOTHING)
def test_any_other_frame_is_nothing(what):
    assert link.read_frame(NOTHING[what]) is None


def test_no_frame_makes_the_reader_fail():
    dice = random.Random(1)
    for _ in range(5000):
        frame = bytearray(dice.choice([*HEX.values(), dice.randbytes(dice.randrange(1, 200))]))
        for _ in range(dice.randrange(6)):
            frame[dice.randrange(len(frame))] = dice.randrange(256)
        heard = link.read_frame(bytes(frame[: dice.randrange(len(frame) + 1)]))
        assert heard is None or (ipaddress.ip_address(heard.address) and len(heard.mac) == 6)


################################################################################
# State directory
################################################################################


def config_of(state_dir: Path, **more: Any) -> link.Config:
    base = {"interface": "eth0", "hostname": "node1", "listen": "127.0.0.1:0", "handover_timeout": 0.1}
    return make_config({**base, "state_dir": str(state_dir), **more}, {}, {})


def store_in(state_dir: Path, mac: str = "02:00:00:00:0a:01", **more: Any) -> link.Store:
    return link.Store(config_of(state_dir, **more), mac)


def some_vips(count: int) -> list[VirtualIP]:
    return [VirtualIP(link.parse_address(f"10.1.{n // 250}.{n % 250 + 1}"), (), 5, f"vip-{n}") for n in range(count)]


def test_ips_are_kept_privately_and_without_left_overs(tmp_path):
    store = store_in(tmp_path)
    assert store.load_ips() == []
    store.save_ips(some_vips(3))
    store.save_session({"states": {}})
    assert store_in(tmp_path).load_ips() == some_vips(3)
    with open(tmp_path / "ips.json", encoding="utf-8") as old:
        store.save_ips(some_vips(2))
        assert len(json.load(old)["ips"]) == 3  # a new file took its place; it was not written over
    assert {(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        ("ips.json", 0o600),
        ("session.json", 0o600),
    }


WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
from test_link import Path, some_vips, store_in
store, few, many = store_in(Path(sys.argv[2])), some_vips(1), some_vips(500)
while True:
    store.save_ips(few); store.save_ips(many)
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    path, dice = tmp_path / "ips.json", random.Random(2)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(HERE), str(tmp_path)])
        try:
            until(path.exists, timeout=20)
            for _ in range(dice.randrange(20, 60)):  # what a reader sees meanwhile is what a kill would leave
                assert len(json.loads(path.read_bytes())["ips"]) in (1, 500)
        finally:
            child.kill()
            child.wait()
        assert len(store_in(tmp_path).load_ips()) in (1, 500)
        path.unlink()


CORRUPT = [b"", b"\xff\xfe", b"[]", b"[" * 100000, b'{"ips": [{"ip": "10.0', b'{"ips": null}', b'{"ips": 5}']
CORRUPT += [b'{"ips": [%s]}' % ip for ip in (b'"10.0.0.10"', b'{"ip": "10.0.0.0/8"}', b'{"ip": "10.0.0.10", "id": 5}')]


@table("content", CORRUPT)
def test_a_corrupt_file_is_set_aside_whole_with_an_error(tmp_path, caplog, content):
    (tmp_path / "ips.json").write_bytes(content)
    assert store_in(tmp_path).load_ips() == []
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("ips.json.corrupt-") and aside.read_bytes() == content
    assert [record.levelname for record in caplog.records] == ["ERROR"] and str(aside) in caplog.text


def test_a_second_corrupt_file_does_not_take_the_place_of_the_first(tmp_path):
    for content in (b"one", b"two"):
        (tmp_path / "ips.json").write_bytes(content)
        store_in(tmp_path).load_ips()
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"one", b"two"]


def test_without_a_directory_reading_is_empty_and_only_writing_what_must_last_fails(tmp_path):
    (tmp_path / "file").write_text("")  # also root cannot write below a regular file
    for directory in (tmp_path / "file" / "state", tmp_path / "absent"):
        store = store_in(directory)
        assert (store.load_ips(), store.load_session()) == ([], {})
        store.save_session({})
        with pytest.raises(link.Unavailable) as error:
            store.save_ips(some_vips(1))
        assert str(directory) in error.value.body["detail"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


OTHERS = [{"hostname": "node2"}, {"mac": "02:00:00:00:0a:02"}]
OTHERS += [{"interface": "eth1"}, {"zookeeper": "z:1"}, {"zookeeper_root": "/x"}]


@table("other", [{}, {"max_ips": 5}, *OTHERS])
def test_a_session_is_adopted_only_by_the_same_host_and_ensemble(tmp_path, other):
    store_in(tmp_path).save_session({"session": [1, "ab"]})
    assert store_in(tmp_path, **other).load_session().get("session") == (None if other in OTHERS else [1, "ab"])


def test_a_session_does_not_outlive_the_boot(tmp_path, monkeypatch):
    store_in(tmp_path).save_session({"session": [1, "ab"]})
    monkeypatch.setattr(link, "boot_id", lambda: "another boot")
    assert store_in(tmp_path).load_session() == {}


WRONG_SESSIONS = [{"session": [1, "xy"]}, {"session": 5}, {"session": ["a", "ab"]}, {"states": {"10.0.0.10": "BUSY"}}]
WRONG_SESSIONS += [{"states": ["STANDBY"]}, {"addresses": ["10.0.0"]}, {"hosts": 5}, {"macs": ["02:00:00:00:00:01"]}]


@table("content", WRONG_SESSIONS)
def test_a_session_with_a_wrong_word_in_it_is_a_fresh_start(tmp_path, content):
    store_in(tmp_path).save_session(content)
    assert store_in(tmp_path).load_session() == {}


@table("content", [b"", b"[]", b"5", b"{}", b'{"identity"', b"\xff", b'{"identity": null}', b"[" * 100000])
def test_an_unreadable_session_is_a_fresh_start(tmp_path, content):
    (tmp_path / "session.json").write_bytes(content)
    assert store_in(tmp_path).load_session() == {}


################################################################################
# Health checks
################################################################################


@contextlib.contextmanager
def service(answer: bytes | None) -> Iterator[int]:
    """A port on which every connection gets this answer; None: is accepted and then left alone."""
    kept = []

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                kept.append(server.accept()[0])
                if answer is not None:
                    kept[-1].recv(1000)
                    kept[-1].sendall(answer)
                    kept.pop().close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@table(
    "kind, answer, reason",
    [
        ("TCP", b"", ""),
        ("TCP", None, ""),
        ("HTTP", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ""),
        ("HTTP", b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n\r\n", ""),
        ("HTTP", b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
        ("HTTP", b"HTTP/1.1 500 Oh\r\n\r\n", "500"),
        ("HTTP", b"220 smtp.example.org\r\n", "220 smtp"),
        ("HTTP", b"\x16\x03\x01\xff\xff\0\r\n\r\n", "HTTP"),
        ("HTTP", b"", "HTTP"),
        ("HTTP", None, "timed out"),
    ],
)
def test_a_check_passes_or_says_why_not(kind, answer, reason):
    with service(answer) as port:
        got = link.run_check(HealthCheck(kind, "127.0.0.1", port, "/status?a=b"), 0.2)
    assert (reason in got and f"127.0.0.1:{port}" in got) if reason else got == ""


@table("kind", ["TCP", "HTTP"])
def test_a_refused_or_hanging_connection_and_an_impossible_name_are_failures(kind):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # fills the backlog: the next SYN is not answered
            assert "timed out" in link.run_check(HealthCheck(kind, "127.0.0.1", port), 0.2)
    assert "refused" in link.run_check(HealthCheck(kind, "127.0.0.1", port), 0.2)
    assert link.run_check(HealthCheck(kind, "a..b", 80), 0.2)


################################################################################
# Agent: with a network and a ZooKeeper of make-believe
################################################################################


class FakeNetwork:
    """link.Network in memory; `done` is what was done, in order."""

    def __init__(self, arp: bool = False) -> None:
        self.link = link.Link(7, MAC, True, arp, "")
        self.kernel = {ipaddress.ip_interface(own): False for own in ("10.0.0.1/24", "fe80::1/64", "fd77::1/64")}
        self.done: list[str] = []
        self.incoming: list[link.Heard] = []
        self.broken: OSError | None = None

    def sync(self) -> tuple[link.Link, dict[link.Address, bool], dict[int, str]]:
        return self.link, dict(self.kernel), {4: "10.0.0.1", 6: "fe80::1"}

    def adopt(self, addresses: Iterable[str]) -> None:
        """The kernel remembers by itself."""

    def clear(self, interface: str, addresses: Iterable[str]) -> None:
        """There is one interface only."""

    def add(self, ip: link.Address, lifetime: int = 0) -> None:
        if self.broken:
            raise self.broken
        self.done.append(f"add {ip}")
        self.kernel[ip] = True

    def remove(self, ip: link.Address) -> None:
        self.done.append(f"remove {ip}")
        self.kernel.pop(ip, None)

    def send(self, frames: Iterable[bytes]) -> None:
        heard = [link.read_frame(frame) for frame in frames]
        self.done += [f"{'ask' if h.asks else 'announce'} {h.address}" for h in heard if h]

    def receive(self) -> Iterator[link.Heard]:
        while self.incoming:
            yield self.incoming.pop(0)

    def changed(self) -> bool:
        return True

    def ready(self, ip: Any) -> bool:
        return True

    def gateways(self) -> list[str]:
        return []

    def files(self) -> list[int]:
        return []

    def did(self, *words: str) -> list[str]:
        return [line for line in self.done if line.split()[0] in words]


class FakeCoordinator:
    """link.Coordinator in memory, seen from node1, whose session is 1."""

    def __init__(self, agent: link.Agent, *hosts: str) -> None:
        """These hosts are in the queue for VIP already."""
        self.agent, self.connected, self.obeys, self.serial = agent, True, True, itertools.count()
        self.session: tuple[int, bytes] | None = (1, b"password")
        self.timeout, self.confirmed_at = 4.0, agent.clock.now()
        self.syncing_since: float | None = None
        self.records = {host: link.Record(f"02:00:00:00:0a:0{host[-1]}", (), "") for host in ("node1", "node2")}
        self.queues: dict[str, list[link.Contender]] = {}
        for host in hosts:
            self.enter("10.0.0.10", host)

    def set(self, address: str, contenders: Iterable[link.Contender]) -> None:
        self.queues[address] = list(contenders) if self.obeys else self.queues[address]
        self.agent.post(self.agent.coordinator_changed, address)

    def enter(self, address: str, host: str, session: int = 2) -> None:
        node = link.Contender(f"a__lock__{next(self.serial):010d}", host, session)
        self.set(address, [*self.queues.get(address, []), node])

    def start(self, session: tuple[int, bytes] | None, record: link.Record) -> None:
        self.agent.coordinator_changed("")

    def queue(self, address: str) -> tuple[link.Contender, ...] | None:
        return tuple(self.queues[address]) if address in self.queues else None

    def watch(self, address: str) -> None:
        self.queues.setdefault(address, [])

    def forget(self, address: str) -> None:
        self.queues.pop(address, None)

    def join(self, address: str) -> None:
        self.enter(address, "node1", 1)

    def leave(self, address: str) -> None:
        self.set(address, [c for c in self.queues[address] if c.session != 1])

    def take(self, address: str, mine: link.Contender, ahead: Iterable[link.Contender]) -> None:
        self.set(address, [c for c in self.queues[address] if c not in ahead])

    def publish(self, record: link.Record) -> None:
        """Nobody reads it."""

    def ping(self) -> None:
        self.confirmed_at = self.agent.clock.now()

    def sync(self) -> None: ...

    def drop(self) -> None: ...

    def retry(self) -> None: ...

    def stop(self, wait: float) -> None:
        self.connected = False


@table("fake, real", [(FakeNetwork, link.Network), (FakeCoordinator, link.Coordinator)])
def test_make_believe_has_every_method_of_the_real_thing(fake, real):
    for name, function in inspect.getmembers(real, inspect.isfunction):
        if not name.startswith("_"):
            mine = inspect.signature(getattr(fake, name))
            assert [*mine.parameters] == [*inspect.signature(function).parameters], name


class ByHand(link.Clock):
    """An agent that is driven round by round, on a clock that stands still until it is set."""

    def __init__(self, state_dir: Path, network: FakeNetwork | None = None, check: Any = link.run_check, **config: Any):
        self.network, self.time = network or FakeNetwork(), 1000.0
        connect = FakeCoordinator if config.get("zookeeper") else None
        self.agent = link.Agent(config_of(state_dir, **config), self.network, connect, clock=self, check=check)
        self.agent.start()
        self.run(0.01)

    def now(self) -> float:
        return self.time

    def run(self, seconds: float, pace: float = 0.01) -> None:
        for _ in range(round(seconds / pace)):
            self.time += pace
            self.agent.turn(float("inf"))

    def ip(self) -> dict[str, Any]:
        return self.agent.list_ips()["ips"][0]


ONE = {"ips": [{"ip": VIP}]}
ONE_CHECKED = {"ips": [{"ip": VIP, "checks": [RIGHT_CHECK], "healthcheck_interval": 1}]}


def test_an_address_is_bound_then_announced_and_at_a_delete_unbound_and_announced_no_more(tmp_path):
    one = ByHand(tmp_path, zookeeper="zk:2181")
    one.agent.add_ip({"ip": VIP})
    one.run(20)
    assert one.network.did("add", "announce") == [f"add {VIP}"] + ["announce 10.0.0.10"] * 2 * 6
    one.network.done.clear()
    one.agent.delete_ip("10.0.0.10")
    one.run(80)
    assert one.network.done == [f"remove {VIP}"]


def test_an_address_removed_by_hand_is_back_and_announced_within_a_second(tmp_path):
    one = ByHand(tmp_path, **ONE, zookeeper="zk:2181")
    one.run(0.05)
    one.network.done.clear()
    del one.network.kernel[ipaddress.ip_interface(VIP)]
    one.run(1.0)
    assert one.network.done[:2] == [f"add {VIP}", "announce 10.0.0.10"]


def test_at_start_bound_addresses_stay_strays_of_ours_go_and_foreign_ones_are_left_alone(tmp_path):
    network, stray = FakeNetwork(), ipaddress.ip_interface("10.0.0.11/32")
    network.kernel |= {ipaddress.ip_interface(VIP): True, stray: True}
    before = set(network.kernel)
    ByHand(tmp_path, network, **ONE).run(2)
    assert network.did("add", "remove") == [f"remove {stray}"] and before - set(network.kernel) == {stray}


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
        one.network.incoming.append(link.Heard("10.0.0.10" if answers else "10.0.0.2", OTHER_MAC, False, False))
        one.run(0.05)
    assert one.network.did("ask")
    assert one.network.did("add", "announce")[:2] == ([] if answers else [f"add {VIP}", "announce 10.0.0.10"])


@table("deaf", [True, False])
def test_an_address_that_nobody_answers_for_is_let_go_at_the_limit_only_by_a_deaf_host(tmp_path, deaf):
    one = ByHand(tmp_path, FakeNetwork(arp=True), **ONE, zookeeper="z:2181", witnesses=["10.0.0.9"])
    coordinator = one.agent.coordinator

    def run(seconds: float) -> None:
        for _ in range(int(seconds / 0.05)):
            one.network.incoming += [] if deaf else [link.Heard("10.0.0.7", OTHER_MAC, True, True)]
            coordinator.ping()
            one.run(0.05)

    run(1)
    assert one.ip()["bound"]
    coordinator.enter("10.0.0.10", "node2")
    run(0.5)
    one.agent.stop()
    run(3)
    assert one.ip()["bound"] is not deaf
    one.network.incoming.append(link.Heard("10.0.0.10", OTHER_MAC, False, True))
    run(0.5)
    assert not one.ip()["bound"]


FALL_RISE = [(1, 1, "+-+-", "AFAF"), (3, 1, "--+--+---+", "FFAAAAAAFA"), (2, 3, "+++-+--++-+++", "FFAAAAFFFFFFA")]


@table("fall, rise, results, states", FALL_RISE)
def test_fall_failures_in_a_row_fail_an_ip_and_rise_passes_in_a_row_end_that(tmp_path, fall, rise, results, states):
    to_come, threads, seen = iter(results), threading.active_count(), ""
    config = {**ONE_CHECKED, "health_check_fall": fall, "health_check_rise": rise}
    one = ByHand(tmp_path, check=lambda *_: "" if next(to_come, "+") == "+" else "down", **config)
    for _ in results:
        until(lambda: threading.active_count() <= threads)
        one.run(0.02)
        seen += one.ip()["status"][0]
        one.run(1.2, pace=1.2)
    assert seen == states


def test_a_check_that_hangs_fails_and_is_not_run_twice_at_a_time(tmp_path):
    end, runs, threads = threading.Event(), [], threading.active_count()

    def check(_: HealthCheck, timeout: float) -> str:
        runs.append(timeout)
        return "" if len(runs) == 1 or end.wait(20) else "late"

    one = ByHand(tmp_path, check=check, **ONE_CHECKED, health_check_timeout=0.5, health_check_fall=2)
    until(lambda: threading.active_count() <= threads)
    one.run(0.5)
    assert one.ip()["status"] == "ACTIVATED"
    one.run(10)
    assert (one.ip()["status"], runs) == ("FAILING", [0.5, 0.5])
    end.set()


################################################################################
# HTTP API: over a real socket
################################################################################


class Answer(NamedTuple):
    status: int
    body: Any
    headers: http.client.HTTPMessage


class Served:
    """An agent with its loop in a thread, and its API on a free port."""

    def __init__(self, state_dir: Path, connect: Any = None, check: Any = link.run_check, **config: Any) -> None:
        self.network = FakeNetwork()
        self.agent = link.Agent(config_of(state_dir, **config), self.network, connect, check=check)
        self.agent.start()
        self.server = link.Server(self.agent)
        self.address = self.server.server_address[:2]
        self.loop = threading.Thread(target=self.agent.run, daemon=True)
        self.loop.start()
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.agent.post(self.agent.stop)
        self.loop.join(15)
        assert not self.loop.is_alive()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=15)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            got = connection.getresponse()
            text = got.read()
            return Answer(got.status, json.loads(text) if text else None, got.headers)

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(self.address, 15) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def ips(self) -> list[dict[str, Any]]:
        """Without what changes by itself."""
        ips = self.ask("GET", "/ips").body["ips"]
        return [{key: value for key, value in ip.items() if key not in ("since", "reason")} for ip in ips]

    def wait(self, status: str, *hosts: str) -> dict[str, Any]:
        """For VIP to be like that."""

        def look() -> Any:
            ip = self.ask("GET", f"/ips/{VIP}").body["ip"]
            return ip if (ip["status"], ip["hosts"]) == (status, [*hosts]) else None

        return until(look, f"{status} {hosts}")

    @contextlib.contextmanager
    def stuck(self) -> Iterator[None]:
        """Its loop does nothing meanwhile."""
        begun, end = threading.Event(), threading.Event()
        self.agent.post(lambda: (begun.set(), end.wait(20)))
        assert begun.wait(5)
        try:
            yield
        finally:
            end.set()


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


TCP = {"type": "TCP", "host": "127.0.0.1", "port": 1, "path": "/"}


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
        assert host.ask("GET", f"/ips/{key}")[:2] == (200, {"ip": ip})
        assert host.ask("POST", f"/ips/{key}/lock").status == host.ask("POST", f"/ips/{key}/failover").status == 409
    for method, checks in (("PATCH", [TCP]), ("PUT", [{**TCP, "port": 2}, TCP])):
        status, body, _ = host.ask(method, f"/ips/{ip['id']}", {"healthchecks": checks})
        assert (status, body["id"], body["checks"]) == (200, ip["id"], checks)
    assert [vip.to_json()["checks"] for vip in store_in(tmp_path).load_ips()] == [checks]
    status, body, headers = host.ask("DELETE", f"/ips/{vip}")
    assert (status, body, headers["Content-Length"]) == (204, None, None)
    assert host.ask("GET", f"/ips/{vip}")[:2] == (404, {"resource": "IP", "error": "not found"})
    assert host.ask("GET", "/ips").body == {"ips": []}
    assert host.network.did("add", "remove") == [f"add {vip}", f"remove {vip}"]
    assert host.ask("POST", "/ips", {"ip": vip}).status == 201


def test_version_and_health_say_what_they_should(tmp_path):
    with Served(tmp_path, FakeCoordinator, **ONE, zookeeper="zk:2181") as host:
        assert host.ask("GET", "/version")[:2] == (200, {"version": link.VERSION})
        host.wait("ACTIVATED", "node1")
        status, body, headers = host.ask("GET", "/health")
        assert (status, body["healthy"], headers["Content-Type"]) == (200, True, "application/json")
        assert body["ips"] == {"ACTIVATED": 1, "STANDBY": 0, "FAILING": 0}
        assert body["zookeeper"] == {"state": "connected", "session_timeout": 4.0}
        host.network.link = host.network.link._replace(up=False, trouble="eth0 is down")
        host.agent.post(lambda: None)
        until(lambda: host.ask("GET", "/health").status == 503)
        assert host.ask("GET", "/health").body["interface"] == "eth0 is down"


@table("zeros", [{"id": ""}, {"checks": None}])
def test_the_clients_of_the_original_are_understood_and_understand(host, zeros):
    """What the versions of Scalingo/link's HTTPClient send (Go's zero values, no Content-Type) and decode."""
    status, body, _ = host.ask("POST", "/ips", {"ip": VIP, "healthcheck_interval": 0, **zeros})
    assert status == 201, body
    types = {"id": str, "ip": str, "status": str, "checks": list, "healthcheck_interval": int}
    for ip in (body, host.ask("GET", "/ips").body["ips"][0], host.ask("GET", f"/ips/{VIP}").body["ip"]):
        assert {key: type(ip[key]) for key in types} == types and ip["healthcheck_interval"] == 5
    check = {"type": "TCP", "host": "127.0.0.1", "port": 1}
    status, body, _ = host.ask("PATCH", f"/ips/{ip['id']}", {"healthchecks": [check]})
    assert (status, {key: body["checks"][0][key] for key in check}) == (200, check)
    assert host.ask("PATCH", f"/ips/{ip['id']}", {"healthchecks": None}).body["checks"] == []
    assert host.ask("DELETE", f"/ips/{ip['id']}").status == 204


def wrong(status: int, error: str, *calls: tuple[str, str, Iterable[Any]]) -> Iterator[tuple[str, str, Any, int, str]]:
    return ((method, path, body, status, error) for method, path, bodies in calls for body in bodies)


NEW, MINE, GIVEN = {"ip": "10.0.0.11"}, f"/ips/{VIP}", "/ips/10.0.0.30"
BAD_IPS = ["10.0.0.0/24", "10.0.0.255/24", "224.0.0.1", "127.0.0.1", "::", "fe80::1", "10.0.0.11/0", "x", "", None, 5]
OWN = ["10.0.0.1", "10.0.0.1/24", "fd77::1", "fd77::1/64"]
BAD_CHECKS = [{}, "", 5, False, TCP, [5], *([{**TCP, **bad}] for bad in ({"port": 0}, {"port": "1"}, {"colour": 1}))]
BAD_INTERVALS = [-1, 3601, 1.5, "5", True, [5], 10**30, 1e300]
NOWHERE = ["vip-1", "10.0.0.99", "fd77::99", "10.0.0.10/24", "%00", "%ff%2f..%zz", "a" * 9000, ".", "%20"]
WRONG_CALLS = [
    *wrong(400, "invalid json", ("POST", "/ips", (b"", b"{", b"\xff", b"[" * 60000, b"nil")), ("PATCH", MINE, (b"{",))),
    *wrong(400, "invalid IP", ("POST", "/ips", [{"ip": ip} for ip in BAD_IPS + OWN])),
    *wrong(400, "invalid IP", ("POST", "/ips", ([], b"null", 5, "x", {}, {**NEW, "colour": 1}, {**NEW, "id": "x"}))),
    *wrong(400, "invalid", ("POST", "/ips", [{**NEW, "healthcheck_interval": every} for every in BAD_INTERVALS])),
    *wrong(400, "invalid", ("POST", "/ips", [{**NEW, "checks": checks} for checks in BAD_CHECKS])),
    *wrong(400, "invalid", ("PATCH", MINE, [{"healthcheck_interval": every} for every in BAD_INTERVALS])),
    *wrong(400, "invalid", ("PUT", MINE, [{"healthchecks": checks} for checks in BAD_CHECKS])),
    *wrong(400, "invalid", ("PATCH", MINE, ([], b"null", {"ip": "10.0.0.12"}, {"id": "x"}))),
    *wrong(409, "already exists", ("POST", "/ips", [{"ip": ip} for ip in (VIP, "10.0.0.10/24", "10.0.0.30")])),
    *wrong(409, "configured", ("PATCH", GIVEN, ({"healthchecks": []},)), ("DELETE", GIVEN, (None,))),
    *wrong(409, "no ZooKeeper", ("POST", f"{MINE}/lock", (None,)), ("POST", f"{MINE}/failover", (None, {}))),
    *((verb, f"/ips/{key}", {"checks": []}, 404, "not found") for key in NOWHERE for verb in ("GET", "PUT", "DELETE")),
    *(("POST", f"/ips/{key}/{word}", None, 404, "not found") for key in NOWHERE for word in ("lock", "failover")),
    ("POST", f"{MINE}/bogus", None, 404, "not found"),
    *(("GET", path, None, 404, "not found") for path in ("/", "/ip", "/ipsx", "/version/1", "//", "/ips//lock")),
    *((method, "/nowhere", b"{", 404, "not found") for method in ("POST", "BREW", "OPTIONS", "HEAD")),
    *((method, "/ips", None, 405, "GET, POST") for method in ("DELETE", "OPTIONS", "BREW", "TRACE", "HEAD")),
    ("POST", MINE, {}, 405, "DELETE, GET, PATCH, PUT"),
    *((method, f"{MINE}/{word}", None, 405, "POST") for method in ("GET", "DELETE") for word in ("lock", "failover")),
    *((method, path, {}, 405, "GET") for method in ("POST", "PUT") for path in ("/version", "/health")),
    *((method, "/ips", b" " * 65537, 413, "body too large") for method in ("POST", "GET")),
]  # fmt: skip


@table("method, path, body, status, error", WRONG_CALLS)
def test_a_wrong_request_is_refused_and_changes_nothing(busy, method, path, body, status, error):
    before, answer = busy.ips(), busy.ask(method, path, body)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json"), answer
    if status == 405:
        assert answer.headers["Allow"] == error
    elif status == 404 and method != "HEAD":
        known = re.match(r"/ips/[^/]+(/24)?(/lock|/failover)?$", path)
        assert answer.body == {"error": error, "resource": "IP" if known else "path"}
    elif method != "HEAD":
        assert answer.body["error"].startswith(error) and answer.body["detail"]
    assert busy.ips() == before


POST = b"POST /ips HTTP/1.1\r\n"
RAW = [
    (411, POST + b"\r\n"),
    (411, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    (415, POST + b"Content-Length: 2\r\nContent-Type: text/xml\r\n\r\n{}"),
    (400, POST + b"Content-Length: 2\r\nContent-Type: application/json; charset=utf-8\r\n\r\n{}"),
    *((400, POST + b"Content-Length: " + length + b'\r\n\r\n{"ip": "10.0.0.11"}') for length in
      (b"-1", b"+19", b"19, 19", b"two", b"", b"0x13", b"19\r\nContent-Length: 18", b"9" * 5000, b"50")),
    (413, POST + b"Content-Length: " + b"9" * 17 + b"\r\n\r\n{}"),
    (400, b"GARBAGE\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),  # a TLS hello
    (400, b"GET /ips HTTP/1.1 x\r\n\r\n"),
    (400, b"GET /ips HTTP/x\r\n\r\n"),
    (505, b"GET /ips HTTP/3.0\r\n\r\n"),
    (414, b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n"),
    (431, b"GET /ips HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
    (431, b"GET /ips HTTP/1.1\r\nX: " + b"y" * 70000 + b"\r\n\r\n"),
    (200, b"GET /ips HTTP/1.0\r\n\r\n"),
    (200, b"GET /ips/?now=1 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"),
]  # fmt: skip


@table("status, data", RAW)
def test_what_is_hardly_http_is_answered_in_json_too(busy, status, data):
    before = busy.ips()
    head, _, body = busy.raw(data).partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] %d " % status, head), (head, body)
    assert b"Connection: close" in head and json.loads(body)
    assert busy.ips() == before


def test_no_request_body_makes_the_server_fail(busy):
    dice, before = random.Random(3), busy.ips()
    junk = [None, 0, -1, 1.5, True, "", "x", "\ud800", "10.0.0.0/8", [], {}, [[]], [None], {"a": 1}, 10**400, math.nan]
    for _ in range(300):
        check = {key: dice.choice(junk) for key in ("type", "host", "port", "path") if dice.random() < 0.8}
        keys = dice.sample(["ip", "checks", "healthchecks", "healthcheck_interval", "id", "\0", "\ud800"], 3)
        body = {key: dice.choice([*junk, check, [check], [{**TCP, **check}]]) for key in keys}
        assert busy.ask(*dice.choice([("POST", "/ips"), ("PATCH", "/ips/vip-1")]), body).status in (400, 404), body
    assert busy.ips() == before


def test_more_ips_than_max_ips_are_refused(tmp_path):
    with Served(tmp_path, max_ips=1, **ONE) as host:
        status, body, _ = host.ask("POST", "/ips", NEW)
        assert status == 409 and "max_ips" in body["detail"]


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


def test_a_command_to_a_stuck_loop_is_answered_503_and_not_carried_out_later(host, monkeypatch):
    monkeypatch.setattr(link, "REQUEST_TIME", 0.4)
    with host.stuck():
        assert (host.ask("GET", "/health").status, host.ask("POST", "/ips", {"ip": VIP}).status) == (503, 503)
    assert host.ask("GET", "/ips").body == {"ips": []}


def queue_of(*hosts: str) -> Callable[[link.Agent], FakeCoordinator]:
    return lambda agent: FakeCoordinator(agent, *hosts)


WITH_ZOOKEEPER = {**ONE, "zookeeper": "zk:2181"}


def test_lock_takes_the_ip_and_failover_gives_it_away(tmp_path):
    with Served(tmp_path, queue_of("node2"), **WITH_ZOOKEEPER) as host:
        ip = host.wait("STANDBY", "node2", "node1")
        assert (ip["holder"], ip["bound"]) == ("node2", False)
        assert host.ask("POST", f"{MINE}/failover").body["error"] == "not the holder"
        assert host.ask("POST", f"{MINE}/lock").status == 204
        ip = host.ask("GET", MINE).body["ip"]
        assert (ip["status"], ip["bound"], ip["hosts"]) == ("ACTIVATED", True, ["node1"])
        assert host.ask("POST", f"{MINE}/lock").status == 204  # it has it already
        assert host.ask("POST", f"{MINE}/failover").body["error"] == "nobody can take it"
        host.agent.post(host.agent.coordinator.enter, "10.0.0.10", "node2")
        host.wait("ACTIVATED", "node1", "node2")
        assert host.ask("POST", f"{MINE}/failover").status == 204
        assert not host.wait("STANDBY", "node2", "node1")["bound"]


@table(
    "other, change, config, error",
    [
        ("node2", {"connected": False}, {}, "ZooKeeper is out of reach"),
        ("foreign", {}, {}, "foreign lock"),
        ("node2", {}, {"promise": "at-most-one"}, "at-most-one"),
        ("node2", {}, ONE_CHECKED, "failing"),
    ],
)
def test_a_lock_that_cannot_be_had_is_refused_with_the_reason(tmp_path, other, change, config, error):
    with Served(tmp_path, queue_of(other), check=lambda *_: "down", **{**WITH_ZOOKEEPER, **config}) as host:
        host.wait("FAILING", other) if error == "failing" else host.wait("STANDBY", other, "node1")
        host.agent.post(lambda: vars(host.agent.coordinator).update(change))
        status, body, _ = host.ask("POST", f"{MINE}/lock")
        assert (status, body["error"], bool(body["detail"])) == (409, error, True)


def test_a_move_that_is_not_seen_to_end_is_answered_504_with_the_ip_as_it_is(tmp_path):
    with Served(tmp_path, queue_of("node2"), **WITH_ZOOKEEPER) as host:
        host.wait("STANDBY", "node2", "node1")
        host.agent.post(lambda: vars(host.agent.coordinator).update(obeys=False))
        status, body, _ = host.ask("POST", f"{MINE}/lock")
        assert (status, body["ip"]["ip"], body["ip"]["bound"]) == (504, VIP, False)


def test_a_delete_waits_for_the_host_that_waits_for_the_ip(tmp_path):
    with Served(tmp_path, FakeCoordinator, zookeeper="zk:2181", handover_timeout=0.3) as host:
        host.ask("POST", "/ips", {"ip": VIP})
        host.wait("ACTIVATED", "node1")
        host.agent.post(host.agent.coordinator.enter, "10.0.0.10", "node2")
        host.wait("ACTIVATED", "node1", "node2")
        began = time.monotonic()
        assert host.ask("DELETE", MINE).status == 204
        assert time.monotonic() - began > 0.25
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


@table("say", [b"", b"POST /ips HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"])
def test_a_hundred_half_open_connections_cost_bounded_threads_and_pass(host, monkeypatch, say):
    monkeypatch.setattr(link, "REQUEST_TIME", 1.0)
    before = threading.active_count()
    made = connections(host, 100, say)
    until(lambda: threading.active_count() - before >= link.MAX_REQUESTS)
    assert threading.active_count() - before <= 2 * link.MAX_REQUESTS
    until(lambda: host.ask("GET", "/version").status == 200, "the server serves again")
    for connection in made:
        connection.close()
    until(lambda: threading.active_count() <= before, "the threads are gone")


@table("say", [b"", b"GE", b"GET /ips HTTP/1.1\r\n\r\n", POST + b"Content-Length: 9\r\n\r\n{"])
def test_a_connection_that_is_reset_leaves_no_trace(host, capfd, caplog, say):
    threads = threading.active_count()
    with host.stuck():
        for connection in connections(host, 5, say):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    until(lambda: threading.active_count() <= threads, "the threads are gone")
    assert host.ask("GET", "/version").status == 200
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
