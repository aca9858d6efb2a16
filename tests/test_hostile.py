"""What means harm, or is broken: clients, neighbours on the wire, ZooKeeper's data, files, configurations.

hypothesis and schemathesis make the inputs up; LINK_FUZZ=100 takes a hundred times as many. No input ends an agent or
moves an IP, each is answered by what the API says of itself, and nobody is shown a secret. First what needs no
privileges, then real agents in network namespaces with a real ZooKeeper.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st

import link
from fakes import ADDRESS, MAC, OTHER_MAC, VIP, ByHand, FakeNetwork, Served, config_of, table, until
from lab import Ear, Lab, reap, run, socket_in, wait_until
from link import Kind
from scenarios import QUICK, Cluster
from test_real import kazoo
from test_sim import World

FUZZ = float(os.environ.get("LINK_FUZZ", "1"))


def fuzz(examples: int) -> Any:
    """How many inputs; no two runs have the same."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    most = max(1, round(examples * FUZZ))
    return settings(max_examples=most, deadline=None, database=None, suppress_health_check=checks)


@contextlib.contextmanager
def agent_in(folder: Path, **config: Any) -> Iterator[ByHand]:
    """An agent that is driven by hand, and leaves nothing behind."""
    one = ByHand(folder, FakeNetwork(arp=True), **config)
    try:
        yield one
    finally:
        one.agent.store._disk.shutdown()
        one.agent.pool.shutdown()
        os.close(one.agent.loop.wake)


# == Bodies of requests: as the description says, no more and no less ============

WORDS = ["TCP", "http", "tcp\x00", "10.0.0.10", "10.0.0.10/24", "fd77::1", "/", "/up?x=1", "", "arp", "a.b", "\ud800"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-1, 70000), st.integers(0, 3600).map(lambda n: n + 0.5),
    st.text(st.characters(exclude_characters="\n")), st.sampled_from(WORDS),
)  # fmt: skip
FIELDS = st.sampled_from(
    "ip id checks healthchecks healthcheck_interval type host port path plugin plugin_config x".split()  # noqa: SIM905
)


def near(shape: link.Shape) -> st.SearchStrategy[Any]:
    """Mostly of this shape, with something else in some places."""
    kinds = {
        "null": st.none(),
        "string": st.from_regex(shape.get("pattern", "^[0-9a-f:./]*$"), fullmatch=True).filter(lambda t: "\n" not in t),
        "integer": st.integers(shape.get("minimum"), shape.get("maximum")),
        "array": st.deferred(lambda: st.lists(near(shape["items"]), max_size=2)),
        "object": st.deferred(
            lambda: st.fixed_dictionaries(
                {key: near(shape["properties"][key]) for key in shape["required"]},
                optional={key: near(part) for key, part in shape["properties"].items() if key not in shape["required"]},
            )
        ),
    }
    right = st.one_of([kinds[kind] for kind in shape["type"]])
    return st.one_of(right, right, right, right, right, right, right, ANYTHING)


ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(FIELDS, inner, max_size=4)),
    max_leaves=8,
)
SHAPES = {"check": link.CHECK, "IP": link.IP, "new IP": link.NEW_IP, "change": link.CHANGE, "endpoint": link.ENDPOINT}


@table("name", SHAPES)
def test_a_body_is_refused_where_its_description_refuses_it(name):
    schema = jsonschema.Draft202012Validator(SHAPES[name])
    seen = {True: 0, False: 0}

    @fuzz(150)
    @given(st.one_of(near(SHAPES[name]), ANYTHING))
    def compare(body: Any) -> None:
        try:
            accepted = link.valid(body, SHAPES[name]) is body
        except link.Invalid as error:
            assert error.body["error"].startswith("invalid ") and error.body["detail"]
            accepted = False
        assert accepted == schema.is_valid(body)
        seen[accepted] += 1

    compare()
    assert all(seen.values()), seen


# == Configurations =============================================================

KEYS = [option.name for option in link.OPTIONS]
SECRETS = ("password", "zookeeper_auth", "on_change")
VALUES = st.recursive(
    st.one_of(SCALARS, st.floats(), st.dates(), st.datetimes(), st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | SCALARS, inner, max_size=3),
    max_leaves=5,
)
PIECES = st.sampled_from([
    *KEYS, *":-!&*a{}[]'\"|>%@`?#~,=\n\n\n\t\\ ", "!!", "<<", "---", "...", "  ", ": ", "- ", "*a", "&a ", "\n  ",
    "0x1f", "017", "1:30", "1_0", "1e9", ".nan", ".inf", "2026-13-45", "yes", "NO", "null", "eth0", "10.0.0.10", "::1",
    *(f"!!{tag} " for tag in ("int", "bool", "float", "null", "timestamp", "binary", "set", "omap", "pairs")),
    "!!python/name:os.system ", "\ufeff", "\u2028", "\x85", "\0", "\x1b", "9" * 5000,
])  # fmt: skip
USUAL = [1, 2, 5, 2.5, "7", "u:p", "z1:2181", "https://h/x?y=z", "/x", "10.0.0.1:80", "at-most-one", "INFO", "n1", [],
         [{"ip": "10.0.0.10"}], ["10.0.0.9"]]  # fmt: skip
SOUP = st.lists(PIECES, max_size=12).map("".join)
BOMB = "ips:\n" + "".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(30))


def refused(path: Path, text: str | bytes, **environ: str) -> str:
    """The error; "" where the agent could start."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        config = link.make_config(link.read_config(str(path)), environ, {})
    except link.ConfigError as error:
        known = "|".join([*KEYS, *link.REMOVED, re.escape(str(path))])
        assert re.fullmatch(rf"({known}): [^\x00-\x1f\x7f\ud800-\udfff]{{10,}}", str(error)), error
        return str(error)
    link.credentials(config.user, config.password)
    assert os.fsencode(config.state_dir) and config.listen_address
    return ""


def dumped(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, allow_unicode=True)


@fuzz(250)
@given(st.one_of(
    st.dictionaries(st.sampled_from(KEYS), st.one_of(st.sampled_from(USUAL), VALUES), max_size=4).map(
        lambda some: dumped({"interface": "eth0", **some})),
    VALUES.map(dumped), SOUP, SOUP.map("interface: eth0\n{}".format), st.binary(), st.text(),
    st.tuples(st.sampled_from(KEYS), SOUP).map(": ".join),
))  # fmt: skip
@example(BOMB)
@example(BOMB.replace("ips", "witnesses"))
@example(BOMB.replace("ips", "hostname"))
@example("max_ips: 0x" + "f" * 5000)
@example("interface: eth0\nips: &a [*a]")
@example("interface: eth0\nips: [{ip: 10.0.0.1, checks: &c [*c]}]")
def test_a_configuration_is_taken_or_refused_by_key_and_remedy(tmp_path, text):
    event("refused" if refused(tmp_path / "link.yml", text) else "taken")


@fuzz(100)
@given(st.sampled_from(SECRETS), st.lists(st.one_of(PIECES, st.just("S3CRET")), min_size=1, max_size=5))
def test_whatever_stands_where_a_secret_belongs_is_not_shown(tmp_path, key, pieces):
    text = "".join(pieces)
    assume("S3CRET" in text and text.splitlines() == [text])  # else it may be a key
    assert "S3CRET" not in refused(tmp_path / "link.yml", f"user: u\n{key}: {text}\n")
    with contextlib.suppress(link.ConfigError):
        assert "S3CRET" not in refused(tmp_path / "link.yml", "interface: eth0", **{f"LINK_{key.upper()}": text})


@fuzz(100)
@given(st.dictionaries(st.sampled_from([*link.KEYS]), SOUP | st.text() | st.sampled_from(["[", "1", "\udcff"])))
def test_so_are_variables_of_the_environment(tmp_path, environ):
    refused(tmp_path / "link.yml", "interface: eth0", **environ)


# == Frames, claims, floods ====================================================

HOSTS_MACS = [MAC, OTHER_MAC, b"\x02\0\0\0\x0a\x03", b"\x02\0\0\0\0\x01", b"\xff" * 6, bytes(6)]
ADDRESSES = st.one_of(
    st.sampled_from([ADDRESS, "fd77::100", "10.0.0.1", "0.0.0.0", "::", "255.255.255.255"]).map(ipaddress.ip_address),
    st.ip_addresses(),
)  # fmt: skip


@st.composite
def frames(draw: Callable[..., Any]) -> bytes:
    """As LinK sends them, then damaged in some places, cut off or padded; or any bytes at all."""
    sender = link.Frames(draw(st.sampled_from(HOSTS_MACS)), draw(st.sampled_from([{}, {6: "fe80::2"}])))
    address, to = draw(ADDRESSES), draw(st.sampled_from([b"", *HOSTS_MACS]))
    made = [sender.ask(address, to, kind) for kind in (Kind.ASK, Kind.WANT, Kind.GIVE)]
    frame = bytearray(draw(st.sampled_from([*made, *sender.announce(address)])))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(frame) - 1), st.integers(0, 255)), max_size=3)):
        frame[at] = byte
    end = draw(st.integers(0, len(frame))) if draw(st.booleans()) else len(frame)
    return bytes(frame[:end]) + draw(st.binary(max_size=20))


@fuzz(300)
@given(st.one_of(frames(), frames(), st.binary(max_size=128)))
def test_a_frame_says_what_scapy_reads_in_it(frame):
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
    from scapy.layers.l2 import ARP, Ether

    heard, packet = link.read_frame(frame), Ether(frame) if len(frame) >= 14 else None
    read, arp = None, packet and packet.getlayer(ARP, 1)
    if arp and packet.payload is arp and len(frame) >= 42:
        usual = (arp.hwtype, arp.ptype, arp.hwlen, arp.plen) == (1, 0x800, 6, 4) and arp.hwsrc == packet.src
        word = arp.op in (24, 25) and arp.hwdst == "4c:6e:4b:01:00:00"
        proxys = arp.op == 2 and arp.psrc == arp.pdst and not frame[0] & 1  # it answers an announcement
        if usual and arp.psrc != "0.0.0.0" and arp.op in (1, 2) and not proxys:
            read = arp.psrc, Kind.CLAIM
        elif usual and arp.psrc == "0.0.0.0" and (arp.op == 1 or word):
            read = arp.pdst, Kind(arp.op)
    for layer, kind in ((ICMPv6ND_NS, Kind.ASK), (ICMPv6ND_NA, Kind.CLAIM)):
        ip = packet.payload if packet and len(frame) >= 78 else None
        if isinstance(ip, IPv6) and isinstance(ip.payload, layer) and ip.hlim == 255:
            read = str(ipaddress.ip_address(ip.payload.tgt)), kind
    event(heard.kind.name if heard else "nothing")
    if b"\xfd\x01LnK" in frame and read and read[1] is Kind.ASK:  # an option that scapy does not know
        assert heard is None or (heard.address == read[0] and heard.kind is not Kind.CLAIM)
    else:
        assert (heard and (heard.address, heard.kind)) == read
    assert heard is None or (heard.mac == frame[6:12] and heard.broadcast == bool(frame[0] & 1))


SECOND = "fd77::100"
HEARD = st.builds(
    link.Heard, st.sampled_from([ADDRESS, SECOND, "10.0.0.99", "10.0.0.2"]), st.sampled_from(HOSTS_MACS),
    st.sampled_from(Kind), st.booleans(),
)  # fmt: skip
WAVES = st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.1, 1.1, 2.5, 61.0]), st.lists(HEARD, max_size=6)), max_size=15)
TWO = {"ips": [{"ip": VIP}, {"ip": SECOND}]}


def all_bound(one: ByHand) -> bool:
    return all(ip["bound"] for ip in one.agent.list_ips().result(0)["ips"])


@table("zookeeper, promise", [("zk:2181", "at-least-one"), ("zk:2181", "at-most-one"), ("", "at-least-one")])
def test_forged_claims_move_no_ip_that_zookeeper_gave_and_others_for_no_longer_than_they_last(
    tmp_path, zookeeper, promise
):
    @fuzz(20)
    @given(WAVES)
    def forge(waves: list[tuple[float, list[link.Heard]]]) -> None:
        with agent_in(tmp_path, zookeeper=zookeeper, promise=promise, **TWO) as one:
            one.run(6, pace=0.05)
            assert all_bound(one)
            for pause, heard in waves:
                one.network.incoming += heard
                one.run(max(0.01, pause), pace=0.01 if pause < 1 else 0.1)
                assert not zookeeper or not one.network.did("remove"), "whoever claims what, the lock is here"
            one.run(12, pace=0.05)
            assert all_bound(one)
            assert not one.agent.wire._others and len(one.agent.macs) <= link.HOSTS

    forge()


def test_a_flood_of_claims_from_a_hundred_thousand_macs_is_forgotten(tmp_path):
    with agent_in(tmp_path, zookeeper="zk:2181", **TWO) as one:
        one.run(6, pace=0.05)
        for number in range(100_000):
            kind = Kind.ASK if number % 2 else Kind.CLAIM
            one.network.incoming.append(link.Heard(ADDRESS, number.to_bytes(6, "big"), kind, number % 3 > 0))
            if len(one.network.incoming) == 1000:
                one.run(0.02)
        said = len(one.network.did("announce"))
        one.run(5, pace=0.05)
        assert all_bound(one) and not one.network.did("remove") and not one.agent.wire._others
        assert said < 60, "not an announcement for each"


# == What others write: into ZooKeeper, into the state directory ================

ZNODE = st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn"), exclude_characters="/")  # as ZooKeeper allows
NAMES = st.one_of(
    st.text(ZNODE, min_size=1, max_size=20).filter(lambda name: name not in (".", "..")),
    st.from_regex(r"[0-9a-f]{16}[0-9a-f]{0,16}__lock__-?[0-9]{8,11}", fullmatch=True),
)  # fmt: skip
RECORDS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"[" * 100_000, b"9" * 5000, b'"\\ud800"', b"", b"NaN", b"{}"]),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({
        "mac": st.one_of(st.sampled_from(["02:00:00:00:00:07", "", "ff", "0" * 10**5, ":", "x"]), SCALARS),
        "addresses": SCALARS | st.lists(
            st.sampled_from(["192.0.2.101", "192.0.2.1", "::", "fe80::1%x", "10.0.0.0/8", "255.255.255.255", 7])
            | st.ip_addresses(v=4).map(str) | SCALARS, max_size=12),
        "boot": st.one_of(st.just("h1-1"), SCALARS),
    }).map(lambda record: json.dumps(record).encode()),
)  # fmt: skip


@fuzz(200)
@given(RECORDS)
@example(b'{"mac": "ff", "addresses": [], "boot": ""}')
@example(json.dumps({"mac": "", "addresses": ["10.0.0.2"] * 10**5, "boot": "x" * 10**5}).encode())
def test_a_record_is_short_and_its_mac_is_one_whatever_is_written(data):
    record = link.Record.parse(data)
    assert re.fullmatch(r"(([0-9a-f]{2}:){5}[0-9a-f]{2})?", record.mac) and len(record.boot) <= 64
    assert len(record.addresses) <= 8 and all(map(ipaddress.ip_address, record.addresses))
    assert link.Record.parse(json.dumps(record._asdict()).encode()) == record


FOLDERS = st.sampled_from(["", "hosts/", "ips/", "ips/192.0.2.101/"])
RUBBISH = st.lists(st.tuples(FOLDERS, NAMES, RECORDS, st.integers(0, 2**63)))


@fuzz(15)
@given(RUBBISH, st.integers(0, 1000))
def test_rubbish_in_zookeeper_ends_no_agent_and_what_it_moves_is_put_right_when_it_is_gone(rubbish, seed):
    with World(seed) as w:
        w.begin(rest=3)
        holder, paths = w.holder(), []
        for where, name, data, owner in rubbish:
            if (path := f"/link/{where}{name}") not in w.server.nodes:
                queued = "." in where
                w.server.put(path, b"x" if queued else data, owner)
                paths.append(path)
        w.run(3)
        locks = [path for path in paths if "/ips/192.0.2.101/" in path and link.NODE.match(path.rpartition("/")[2])]
        event("with lock nodes" if locks else "without")
        assert all(host.runs for host in w.hosts) and (locks or w.binders() == [holder])
        holder.restart(0.3, 3)
        assert holder.runs and (locks or w.binders() == [holder])
        for path in paths:
            w.server.delete(path) if path in w.server.nodes else None
        w.run(8)
        assert all(host.runs for host in w.hosts) and len(w.binders()) == 1


def like(value: Any) -> st.SearchStrategy[Any]:
    """This JSON value with something else in some places."""
    inside = st.just(value)
    if isinstance(value, dict):
        inside = st.fixed_dictionaries({}, optional={key: like(part) for key, part in value.items()})
    elif isinstance(value, list):
        inside = st.tuples(*map(like, value)).map(list)
    return st.one_of(inside, inside, inside, inside, inside, inside, ANYTHING)


CHANGED = {
    "time": "2026-11-27T06:00:00.000Z",
    "from": "FAILING",
    "to": "STANDBY",
    "event": "fault",
    "reason": "",
    "by": None,
}
ENTRY = {"id": "vip-1", "ip": "10.0.0.11/32", "checks": [{"type": "TCP", "host": "h", "port": 80}]}
SESSION = {
    "identity": ["node1", link.boot_id()], "session": [7, "00ff"], "addresses": [VIP], "states": {ADDRESS: "STANDBY"},
    "hosts": {"node2": {"mac": "02:00:00:00:0a:02", "addresses": ["10.0.0.2"], "boot": ""}}, "macs": {"node2": "x"},
}  # fmt: skip
DAMAGED = {  # each file: what a line of it is like
    "ips.json": like({"ips": [ENTRY, ENTRY]}), "ips.journal": like(["10.0.0.11", ENTRY]),
    "history": like(["node1", ADDRESS, CHANGED]), "session.json": like(SESSION),
}  # fmt: skip
LINE = st.tuples(st.sampled_from(["", "[", "\n", "\0", "\ud800"]), st.integers(0, 200))


TEXTS = {
    name: st.one_of(
        st.binary(max_size=30).map(lambda data: (data, 1)),
        st.sampled_from([(b"[", 10**5), (b"9", 5000), (b'{"":', 10**4), (b"\n", 10**4)]),
        st.lists(line, max_size=3).map(lambda lines: ("\n".join(map(json.dumps, lines)).encode() + b"\n", 1)),
    )
    for name, line in DAMAGED.items()
}


@fuzz(60)
@given(st.fixed_dictionaries({}, optional=TEXTS), st.integers(0, 1000))
def test_an_agent_starts_on_any_state_directory_serves_what_is_configured_and_keeps_what_it_is_told(files, torn):
    with tempfile.TemporaryDirectory() as folder:
        for name, (text, times) in files.items():
            Path(folder, name).write_bytes((text * times)[: -torn % 1000 or None])
        with agent_in(Path(folder), ips=[{"ip": VIP}]) as one:
            one.run(3, pace=0.1)
            served = {ip["ip"]: ip for ip in one.agent.list_ips().result(0)["ips"]}
            assert served[VIP]["bound"]
            assert json.dumps([one.agent.get_ip(ip) for ip in served]) and link.metrics(one.agent).result(0)()[1]
            with contextlib.suppress(link.LinkError):  # it may be there already
                one.call(one.agent.add_ip, {"ip": "10.0.0.77"})
        with agent_in(Path(folder), ips=[{"ip": VIP}]) as one:
            assert "10.0.0.77" in one.agent.vips


# == HTTP: bytes ===============================================================

PATHS = [
    "/", "/ips", "/ips/10.0.0.10", "/ips/10.0.0.10/lock", "/ips/10.0.0.10/failover", "/ips/10.0.0.30%2F32", "*", "",
    "/endpoints", "//", "/endpoints/10.0.0.10/hosts", "/health", "/metrics", "/openapi.json", "/version", "http://h/ips",
    "/ips/%00", "/ips/../health", "/ips?x=1#y", "/ips/" + "a" * 9000, "/ips/\u0661", "/ips/[::1]",
    "/ips/10.0.0.10/24/lock",
]  # fmt: skip
FIELD = st.one_of(
    st.sampled_from([
        *(f"Host: {host}" for host in ("127.0.0.1", "evil.example", "")), "Origin: null", "Expect: 100-continue",
        *(f"Content-Length: {length}" for length in ("0", "21", "1000", "-1", "\u0662", "9" * 20)),
        *(f"Content-Type: {kind}" for kind in ("application/json", ";;;", "multipart/form-data; boundary=x")),
        *(f"Authorization: {word}" for word in ("Basic", "Basic dTpw\u00e9", "Bearer x", "Basic " + "A" * 9000)),
        "Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Accept: text/html", "Connection: keep-alive",
        "Upgrade: h2c", " folded", ": no name", "no colon", "X: " + "y" * 66000, "X\x00: y", "X: \x1b[2J", "\u00e9: y",
    ]), st.text(max_size=20), st.tuples(st.text(max_size=5), st.text(max_size=10)).map(": ".join),
)  # fmt: skip
TEXT = [b'{"ip": "10.0.0.10"}', b'{"ip": "10.0.0.11"}  ', b'{"checks": []}', b"{}", b"[" * 60000, b"9" * 5000]
BODIES = st.one_of(
    st.binary(max_size=40), st.sampled_from(TEXT), near(link.NEW_IP).map(lambda body: json.dumps(body).encode()),
    ANYTHING.map(lambda body: json.dumps(body).encode()),
)  # fmt: skip


@st.composite
def requests(draw: Callable[..., Any]) -> bytes:
    """One or two, mostly like HTTP, maybe cut off."""
    data = b""
    for _ in range(draw(st.integers(1, 2))):
        verb = draw(
            st.sampled_from(
                ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "get", "", "\x16\x03"]
            )
        )
        version = draw(
            st.sampled_from(
                ["HTTP/1.1"] * 5 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1.1", "HTTP/-1.1", "", "HTTP/1.1 x"]
            )
        )
        body = draw(BODIES)
        length = draw(st.sampled_from([[f"Content-Length: {len(body)}"]] * 3 + [[]]))
        lines = [
            f"{verb} {draw(st.sampled_from(PATHS))} {version}",
            *length,
            *draw(st.lists(FIELD, max_size=4)),
            "",
            "",
        ]
        data += draw(st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"])).join(lines).encode("utf-8", "replace") + body
    return data[: draw(st.integers(1, len(data)))] if draw(st.integers(0, 5)) == 0 else data


class Errors(logging.Handler):
    """What an agent logs as an error, and it should not."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


@contextlib.contextmanager
def served(folder: Path, **config: Any) -> Iterator[Served]:
    """An agent with its API; none of its errors is logged, none of its threads is left."""
    errors = Errors()
    link.log.addHandler(errors)
    with Served(folder, ips=[{"ip": "10.0.0.30"}], **config) as host:
        yield host
        until(
            lambda: not [thread for thread in threading.enumerate() if "process_request" in thread.name],
            "no thread",
            15,
        )
        assert not host.server.clients and not errors.seen, errors.seen
    link.log.removeHandler(errors)


def status_of(answer: bytes) -> int:
    """0 where there is none, or HTTP/0.9's, which has no status; what is said of itself is true."""
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):
        return 0
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"connection"] == b"close" and body in (b"", body[: int(fields.get(b"content-length", 0))])
    if body and fields[b"content-type"] == b"application/json":
        json.loads(body)
    return int(head.split(b" ")[1])


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # the agent's threads use random
def test_any_bytes_from_somebody_without_the_password_are_refused_and_change_nothing(tmp_path):
    with served(tmp_path, user="u", password="S3CRET") as host:

        @fuzz(200)
        @given(st.one_of(requests(), requests(), st.binary(max_size=300)))
        @example(b"")
        def send(data: bytes) -> None:
            answer = host.raw(data)
            status = status_of(answer)
            event(str(status))
            assert status in (0, 400, 401, 403, 414, 431, 505) and b"S3CRET" not in answer

        send()
        assert [vip.bound for vip in host.agent.vips.values()] == [True] and len(host.network.did("add", "remove")) == 1


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_any_bytes_from_somebody_who_may_are_answered_as_described_and_what_is_configured_stays(tmp_path):
    with served(tmp_path, max_ips=4) as host:
        known = {200, 201, 204, 400, 403, 404, 405, 409, 411, 413, 415, 414, 431, 505}

        @fuzz(200)
        @given(st.one_of(requests(), requests(), requests(), st.binary(max_size=300)))
        def send(data: bytes) -> None:
            status = status_of(host.raw(data))
            event(str(status))
            assert status in {0, *known}

        send()
        assert host.agent.vips["10.0.0.30"].bound and "remove 10.0.0.30/32" not in host.network.done
        assert host.ask("GET", "/health").status == 200


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


def test_clients_that_stop_in_the_middle_of_a_handshake_hold_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "REQUEST_TIME", 2.0)
    certificate, context = new_certificate(tmp_path), ssl._create_unverified_context()
    with served(tmp_path / "state", tls_cert=certificate, tls_key=certificate) as host, contextlib.ExitStack() as stack:
        for say in (
            b"",
            HELLO,
            b"GET /ips HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\xff\xff" + bytes(100),
            b"\x15\x03\x01\0\2\2\x28",
        ):
            for _ in range(40):
                stack.enter_context(socket.create_connection(host.address, 15)).sendall(say)
            asked = time.monotonic()
            with contextlib.closing(http.client.HTTPSConnection(*host.address, timeout=15, context=context)) as client:
                client.request("GET", "/version")
                assert client.getresponse().status == 200 and time.monotonic() - asked < 1


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_what_zookeeper_says_in_one_go_is_read_in_one_go(tmp_path: Path, secure: bool) -> None:
    """What is in the client's own hands by then makes the socket readable no more: nobody may wait for that."""
    certificate, answers = new_certificate(tmp_path), b"head" + b"and the body" * 300

    def answer(server: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(server.accept()[0])
            client.settimeout(5)
            if secure:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate)
                client = stack.enter_context(context.wrap_socket(client, server_side=True))
            client.sendall(answers)
            client.recv(1)  # stays until the other one goes

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(5)
        answered, address = pool.submit(answer, server), server.getsockname()
        handler = link._kazoo_client(config_of(tmp_path, zookeeper="127.0.0.1:1"), None, print).handler
        tls = {"use_ssl": True, "verify_certs": False} if secure else {}
        with handler.create_connection(address, timeout=5, **tls) as client, contextlib.ExitStack() as stack:
            client.setblocking(False)
            asked, ask = (stack.enter_context(end) for end in socket.socketpair())  # by which requests are told of
            ask.send(b"x")
            assert handler.select([client, asked], [], [], 5)[0][-1] == asked
            got, rest = b"", []
            while len(got) < len(answers):
                wait_until(lambda: client in handler.select([client, asked], [], [], 0)[0])
                with contextlib.suppress(ssl.SSLWantReadError):
                    got += client.recv(4)
                    rest += select.select([client], [], [], 0)[0]
                    assert asked in handler.select([client, asked], [], [], 0.5)[0]
            assert (got, rest) == (answers, [])
        answered.result(5)


def new_certificate(folder: Path) -> str:
    """Of nobody in particular, in one file with its key."""
    pem = str(folder / "both.pem")
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {pem} -out {pem} -subj /CN=x"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return pem


# == Real agents, a real network, a real ZooKeeper =============================


@pytest.fixture(scope="module")
def world() -> Iterator[Cluster]:
    if os.geteuid() or not Path("/usr/share/java/zookeeper.jar").exists():
        pytest.skip("needs root and Debian's zookeeper: sudo ./start.sh test")
    with Lab() as lab:
        yield Cluster(lab)


@pytest.fixture
def c(world: Cluster) -> Iterator[Cluster]:
    """Three hosts with ZooKeeper; nothing goes wrong in their logs."""
    yield world.reset(1, QUICK)
    for host in world.hosts:
        print(f"---- {host.name}\n{world.news(host)[-6000:]}")
        assert not re.search(r"Traceback|Logging error", host.log())


SCHEMATHESIS = """
[dictionaries.ids]
values = ["{canary}", "{canary}/32", "10.77.9.9", "10.77.9.9/24", "vip-1"]
[dictionaries.ips]
values = ["10.77.9.9", "10.77.9.9/24", "{canary}", "10.77.0.1", "10.77.9.0/24"]
[parameters]
"path.id" = {{ dictionary = "ids", probability = 0.6 }}
[generation.dictionaries]
string = {{ dictionary = "ips", probability = 0.2 }}
"""


def test_the_api_is_what_it_says_of_itself_moves_nothing_that_is_configured_and_shows_no_secret(c, tmp_path):
    (host, *_), canary = c.hosts, c.fresh()
    secrets = {"user": "u", "password": "S3CRET-api", "on_change": "http://127.0.0.1:9/S3CRET"}
    secrets |= {"zookeeper_auth": "u:S3CRET", "zookeeper": f"{c.zk.hosts}/its-own"}
    c.start_afresh(host, ips=[{"ip": canary}], max_ips=20, log_level="DEBUG", **secrets)
    wait_until(lambda: canary in host.bound(), 10, "bound")
    url, right = "http://127.0.0.1:1313", base64.b64encode(b"u:S3CRET-api").decode()
    inside = ["ip", "netns", "exec", host.namespace]

    def get(path: str) -> str:
        return run(*inside, "curl", "-s", "-H", f"Authorization: Basic {right}", url + path)

    def used() -> tuple[int, int]:
        return tuple(len(os.listdir(f"/proc/{host.agent.pid}/{what}")) for what in ("task", "fd"))

    wait_until(lambda: json.loads(get("/health"))["healthy"], 10, "healthy")
    threads, files = used()
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS.format(canary=canary))
    program = str(Path(sys.executable).parent / "schemathesis")
    command = [*inside, program, "--config-file", str(tmp_path / "schemathesis.toml"), "run", f"{url}/openapi.json"]
    command += [
        "-a",
        "u:S3CRET-api",
        "-n",
        str(max(1, round(3 * FUZZ))),
        "--checks",
        "all",
        "--no-color",
        "--max-response-time",
        "6",
    ]
    command += ["--exclude-checks", "positive_data_acceptance"]  # a network's address is text, too
    with c.watch(canary, lost=0, quiet=True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0 and " ERROR " not in c.news(host)
    wait_until(
        lambda: used()[0] <= threads + 1 and used()[1] <= files + 1, 15, f"{threads}, {files} as before: {used()}"
    )
    host.config_path.write_text('password: "S3CRET')
    host.kill(signal.SIGHUP)
    wait_until(lambda: "going on as before" in c.news(host), 10, "refused")
    said = [
        get(path)
        for path in ("/", "/ips", f"/ips/{canary}", "/health", "/metrics", "/openapi.json", "/endpoints", "/x")
    ]
    told = [*said, host.log(), Path(f"/proc/{host.agent.pid}/cmdline").read_text(), str(json.loads(get("/health")))]
    assert all("S3CRET" not in text for text in told) and "on_change: URLError" in host.log()


def flood(c: Cluster, seconds: float, frames: list[bytes]) -> int:
    """From the client's card, whose own kernel does not hear it; how many were sent."""
    sock = socket_in(c.lab.client, socket.AF_PACKET, socket.SOCK_RAW)
    sock.bind(("eth0", 0))
    end = time.monotonic() + seconds
    with sock:
        for sent, frame in enumerate(itertools.cycle(frames)):
            with contextlib.suppress(OSError):  # its queue is full
                sock.send(frame)
            if time.monotonic() > end:
                return sent
    return 0


def forged(address: link.PlainAddress, to: bytes, count: int) -> Iterator[bytes]:
    """What so many liars say to everybody and to one host; in between frames are damaged."""
    dice = random.Random(count)
    for _ in range(count):
        liar = link.Frames(b"\x02\x66" + dice.randbytes(4), {6: "fe80::66"})
        for kind in (Kind.ASK, Kind.WANT, Kind.GIVE):
            yield from (liar.ask(address), liar.ask(address, to, kind), *liar.announce(address))
            damaged = bytearray(dice.choice([liar.ask(address), *liar.announce(address)]))
            damaged[dice.randrange(14, len(damaged))] = dice.randrange(256)
            yield bytes(damaged[: dice.randrange(14, len(damaged) + 1)])


@table("family", [4, 6])
def test_a_flood_of_forged_and_malformed_frames_moves_nothing_and_the_api_answers(c, family):
    vip, holder, _ = c.held(family)
    frames = [*forged(ipaddress.ip_address(vip), bytes.fromhex(holder.mac.replace(":", "")), 100)]
    with (
        c.watch(vip, quiet=True, two=0, away=1),
        ThreadPoolExecutor(1) as pool,
        Ear(holder.lab.switch, holder.port) as ear,
    ):
        flooding = pool.submit(flood, c, 1.5, frames)
        while not flooding.done():
            told = [host.api("GET", "/health", timeout=2) for host in c.hosts]
            assert all(health["healthy"] or "is on two hosts" in health["trouble"][0] for _, health in told), told
        print(f"{flooding.result()} frames")
        assert flooding.result() > 1000
    said = [at for at, _, mac in ear.announcements(vip) if mac == holder.mac]
    assert len(said) < 40, "not an announcement for each lie"
    assert c.bound(vip) == [holder]


def test_a_thousand_strangers_in_zookeeper_move_nothing_and_an_order_is_still_carried_out(c):
    vip, holder, (first, _) = c.held()
    with kazoo(c) as client:
        names = [f"/link/hosts/stranger{n}" for n in range(1000)] + [f"/link/ips/{vip}/x{n}" for n in range(500)]
        names += [f"/link/ips/{vip}/x__lock__9{n:09d}" for n in range(500)] + [
            f"/link/ips/{'%' * n}x" for n in range(50)
        ]
        data = [
            b"",
            b"\xff" * 100,
            b"[" * 100_000,
            json.dumps({"mac": holder.mac, "addresses": [], "boot": ""}).encode(),
            json.dumps(
                {"mac": "", "addresses": [f"10.98.0.{n}" for n in range(250)] * 200, "boot": "x" * 9000}
            ).encode(),
        ]
        with c.watch(vip, quiet=True, two=0, away=1):
            for made in [
                client.create_async(name, data[n % len(data)] if n < 20 else data[n % 2])
                for n, name in enumerate(names)
            ]:
                made.get(30)
            ends = time.monotonic() + 1.5
            while time.monotonic() < ends:
                answers = [host.api("GET", f"/ips/{vip}", timeout=2) for host in c.hosts]
                assert [status for status, _ in answers] == [200] * 3
            assert len(answers[0][1]["ip"]["hosts"]) == 503
            holder.stop(signal.SIGKILL)
            c.start(holder)
            wait_until(lambda: c.status(holder, vip) == "ACTIVATED", 10, "adopted")
        wait_until(
            lambda: holder.api("POST", f"/ips/{vip}/failover", timeout=10)[0] == 204, 10, "ZooKeeper is there again"
        )
        wait_until(lambda: c.bound(vip) == [first], 5, "moved")
        for gone in [client.delete_async(name) for name in names]:
            gone.get(30)
    c.settled(vip)


def test_a_state_directory_that_fills_up_or_becomes_read_only_moves_nothing_and_is_said_until_it_can_be_written_again(
    c,
):
    (host, *_), vip = c.hosts, c.fresh()
    state = host.directory / "state"
    read_only = ["mount", "-o", "remount,ro", str(state)]  # refused while a file is being written
    reap(host.agent)
    run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(state))
    try:
        c.start_afresh(host, ips=[{"ip": vip}])
        wait_until(lambda: c.status(host, vip) == "ACTIVATED", 10, "serves")
        kept = [c.add(host)]
        told = lambda: json.loads((state / "session.json").read_text())["states"].get(vip)  # noqa: E731
        wait_until(lambda: told() == "ACTIVATED", 5, "a restart will know it")
        with c.watch(vip, lost=0, quiet=True):
            for how in ("full", "read-only"):
                if how == "full":
                    with contextlib.suppress(OSError), (state / "filler").open("wb", buffering=0) as filler:
                        while filler.write(bytes(1024)):
                            pass
                else:
                    wait_until(lambda: not subprocess.call(read_only), 10, "read-only")
                added = [host.api("POST", "/ips", {"ip": c.fresh()})]
                while added[-1][0] == 201:  # what fits into a page that it has already
                    kept.append(added[-1][1]["ip"].partition("/")[0])
                    added.append(host.api("POST", "/ips", {"ip": c.fresh()}))
                status, answer = added[-1]
                assert (status, answer["error"]) == (503, "state directory") and str(state) in answer["detail"]
                host.stop(signal.SIGKILL)
                c.start(host)
                wait_until(lambda: c.serves(host) and {vip, *kept} <= host.bound(), 10, how)
                wait_until(lambda: "cannot be written" in host.api("GET", "/health")[1]["state_dir"], 10, "said")
                for inside in (
                    [],
                    ["nsenter", "-t", str(host.agent.pid), "-m"],
                ):  # `ip netns exec` gives it mounts of its own
                    run(*inside, "mount", "-o", "remount,rw", str(state))
                (state / "filler").unlink(missing_ok=True)
                kept.append(c.add(host))
                wait_until(lambda: host.api("GET", "/health")[1]["state_dir"] == "written", 20, "said")
                host.stop(signal.SIGKILL)
                c.start(host)
                wait_until(lambda: c.serves(host) and {vip, *kept} <= host.bound(), 10, "kept")
    finally:
        reap(host.agent)
        run("umount", "-l", str(state))
