"""An agent whose network and ZooKeeper are make-believe: driven round by round, or with its loop and its API."""

from __future__ import annotations

import contextlib
import functools
import http.client
import inspect
import ipaddress
import itertools
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

import link
from link import Lock, Want

MAC, OTHER_MAC = bytes.fromhex("020000000a01"), bytes.fromhex("020000000a02")
VIP, ADDRESS = "10.0.0.10/32", "10.0.0.10"
ASK, CLAIM, WANT, GIVE = link.Kind
WORDS = {ASK: "ask", CLAIM: "announce", WANT: "want", GIVE: "give"}
TOLD = "".join(map(inspect.getsource, (link.of_host, link.of_ip)))
METRICS = {f"link_{name}" for name in re.findall(r'^ {8}"(\w+)": \(', TOLD, re.MULTILINE)}


table = functools.partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "__name__", repr(value)[:50]))


def until(condition: Callable[[], Any], what: str = "", timeout: float = 5.0) -> Any:
    """The condition's value as soon as it is true; fails after the timeout."""
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or inspect.getsource(condition)}"
        pause.wait(0.002)
    return value


def public(cls: type) -> dict[str, str]:
    """The signatures of its methods."""
    functions = inspect.getmembers(cls, inspect.isfunction)
    return {name: str(inspect.signature(f)).replace("link.", "") for name, f in functions if name[0] != "_"}


def config_of(state_dir: Path, **more: Any) -> link.Config:
    base = {"interface": "eth0", "hostname": "node1", "listen": "127.0.0.1:0"}
    return link.make_config({**base, "state_dir": str(state_dir), **more}, {}, {})


class FakeNetwork:
    """link.Network in memory; `done` is what was done, in order."""

    unsent, send_error = MappingProxyType(dict[int, tuple[float, float, str]]()), ""

    def __init__(self, arp: bool = False) -> None:
        self.link = link.Link(7, MAC, True, arp, "")
        self.kernel = {ipaddress.ip_interface(own): False for own in ("10.0.0.1/24", "fe80::1/64", "fd77::1/64")}
        self.done: list[str] = []
        self.incoming: list[link.Heard] = []
        self.broken: OSError | None = None

    def sync(self, listen: bool = True) -> tuple[link.Link, dict[link.Address, bool], dict[int, str]]:
        return self.link, dict(self.kernel), {4: "10.0.0.1", 6: "fe80::1"}

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
        self.done += [f"{WORDS[h.kind]} {h.address}" for h in heard if h]

    def receive(self, limit: int = 512) -> tuple[list[link.Heard], bool]:
        heard, self.incoming = self.incoming[:limit], self.incoming[limit:]
        return heard, len(heard) == limit

    def hear_only(self, addresses: Collection[str] | None) -> None:
        """What comes in is about our addresses."""

    def clear(self, addresses: Collection[link.Address], lasting: bool = False) -> None:
        """There is one interface only."""

    def changed(self) -> bool:
        return True

    def ready(self, ip: link.Address) -> bool:
        return any(ip.ip == each.ip for each in self.kernel)

    def gateways(self) -> list[str]:
        return []

    def files(self) -> list[int]:
        return []

    def did(self, *words: str) -> list[str]:
        return [line for line in self.done if line.split()[0] in words]


class FakeReferee:
    """link.Referee in memory, seen from node1, whose session is 1."""

    due, refused, causes, timeout, rest = math.inf, "", "", 4.0, link.Referee.rest

    def __init__(self, agent: link.Agent, *hosts: str) -> None:
        """These hosts are in the queue for VIP already."""
        self.agent, self.state, self.obeys, self.serial = agent, "connected", True, itertools.count()
        self.session: tuple[int, bytes] | None = (1, b"password")
        self.records = {host: link.Record(f"02:00:00:00:0a:0{host[-1]}", (), "") for host in ("node1", "node2")}
        self.queues: dict[str, tuple[link.Contender, ...]] = {}
        for host in hosts:
            self.enter("10.0.0.10", host)

    def enter(self, address: str, host: str, session: int = 2) -> None:
        node = link.Contender(f"a__lock__{next(self.serial):010d}", session if host[:4] == "node" else 0, host)
        self.queues[address] = (*self.queues.get(address, ()), node)
        self.agent.loop.post(self.agent.referee_news, address)

    def start(self, session: tuple[int, bytes] | None, record: link.Record) -> None:
        self.agent.referee_news("")

    def want(self, address: str, want: Want) -> None:
        queue = self.queues.get(address, ())
        mine = [c for c in queue if c.session == 1]
        if not self.obeys or want is Want.GONE:
            self.queues.pop(address, None) if self.obeys else None
        elif want in (Want.IN, Want.FIRST) and not mine:
            self.enter(address, "node1", 1)
        elif (want is Want.WATCH and mine) or (want is Want.FIRST and queue[0] not in mine):
            left = [c for c in queue if c not in mine] if want is Want.WATCH else queue[queue.index(mine[0]) :]
            self.queues[address] = tuple(left)
            self.agent.loop.post(self.agent.referee_news, address)

    def view(self, address: str, now: float, since: float) -> link.LockView:
        queue = self.queues.get(address, ())
        place = next((n for n, c in enumerate(queue) if c.session == 1), -1)
        known = Lock.MINE if place == 0 else Lock.OTHER if queue else Lock.NOBODY
        return link.LockView(known if self.state == "connected" else Lock.UNKNOWN, queue, place)

    def age(self, now: float) -> float:
        return 0.0

    def changes(self, address: str, now: float) -> Iterator[float]:
        yield from ()

    def tick(self, now: float) -> None: ...

    def distrust(self, address: str = "") -> None: ...

    def ask(self) -> None: ...

    def publish(self, record: link.Record) -> None: ...

    def stop(self, wait: float) -> None: ...


class AtOnce(SimpleNamespace):
    """A pool whose checks have run when submit() returns."""

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        work(*args)


class ByHand(link.Clock):
    """An agent that is driven round by round, on a clock that stands still until it is set."""

    def __init__(self, state_dir: Path, network: FakeNetwork | None = None, pool: Any = None, **config: Any):
        self.network, self.time = network or FakeNetwork(), 1000.0
        made = config_of(state_dir, **config)
        connect = FakeReferee if made.zookeeper else lambda _: link.NoReferee()
        self.agent = link.Api(made, self.network, link.Store(made), connect, clock=self, pool=pool)
        self.agent.start()
        self.run(0.01)

    def now(self) -> float:
        return self.time

    def run(self, seconds: float, pace: float = 0.01) -> None:
        for _ in range(round(seconds / pace)):
            self.time += pace
            self.agent.turn(float("inf"))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """As Loop.call(); its clock stands still meanwhile."""
        future = self.agent.loop.ask(function, *args)
        until(lambda: self.agent.turn(math.inf) or future.done())
        return future.result()

    def ip(self) -> dict[str, Any]:
        return self.agent.list_ips().result(0)["ips"][0]


class Answer(NamedTuple):
    status: int
    body: Any
    headers: http.client.HTTPMessage


class Served:
    """An agent with its loop in a thread, and its API on a free port."""

    def __init__(self, state_dir: Path, *hosts: str, pool: Any = None, **config: Any) -> None:
        """The hosts are in ZooKeeper's queue for VIP already."""
        self.network, made = FakeNetwork(), config_of(state_dir, **config)
        connect = (lambda agent: FakeReferee(agent, *hosts)) if made.zookeeper else lambda _: link.NoReferee()
        self.agent = link.Api(made, self.network, link.Store(made), connect, pool=pool)
        self.agent._watchdog = lambda: None  # it would end this process, some seconds after the loop
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
        self.agent.loop.post(self.agent.stop)
        self.loop.join(15)
        assert not self.loop.is_alive()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=15)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, headers or {})
            got = connection.getresponse()
            text = got.read().decode()
            spoken = "json" in got.headers.get("Content-Type", "")
            return Answer(got.status, json.loads(text) if spoken and text else text or None, got.headers)

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
        self.agent.loop.post(lambda: (begun.set(), end.wait(20)))
        assert begun.wait(5)
        try:
            yield
        finally:
            end.set()
