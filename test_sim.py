"""LinK in a simulated world: virtual time, a simulated LAN and ZooKeeper; the Agent's and Coordinator's real code.

One seed is one run: the same seed gives the same faults, the same frames and the same end, whatever the hash seed.

    pytest test_sim.py                        the scenarios and the first 200 seeds
    SEEDS=5000 pytest test_sim.py -k seeds    more of them (SEEDS=7000:9000 for a range)
    python test_sim.py 4711                   one seed, with its timeline

What is simulated is what real networks do to LinK: kernels answer for bound addresses also while an agent is stopped,
frames are lost and late, TCP holds what cannot pass and delivers it late, sessions end at ZooKeeper's ticks.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import itertools
import logging
import math
import os
import random
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from kazoo import exceptions as kazoo

import link

GATEWAY = "192.0.2.254"
VIPS = ("192.0.2.101/32", "2001:db8::102/128", "192.0.2.103/32")
FOREVER = float("inf")
VERBOSE = __name__ == "__main__"
READ_FRAME = functools.cache(link.read_frame)
REAL_FRAMES = link.build_frames
BARE = functools.cache(lambda ip: str(ip.ip))
BUILD_FRAMES = functools.cache(lambda address, mac, low: REAL_FRAMES(address, mac, {6: low} if low else {}))


class SimClock(link.Clock):
    """Virtual time."""

    time = 1000.0

    def now(self) -> float:
        return self.time

    def stamp(self) -> str:
        return f"{self.time:.4f}"


class SimStore(link.Store):
    """The state directory, in memory."""

    def __init__(self, config: link.Config, mac: str, files: dict[str, Any]) -> None:
        super().__init__(config, mac)
        self._files = files

    def load_ips(self) -> list[link.VirtualIP]:
        return list(self._files.get("ips", []))

    def save_ips(self, vips: Iterable[link.VirtualIP]) -> None:
        self._files["ips"] = list(vips)

    def load_session(self) -> dict[str, Any]:
        got = self._files.get("session", {})
        return dict(got) if got.get("identity") == self.identity else {}

    def save_session(self, content: Mapping[str, Any]) -> None:
        self._files["session"] = {"identity": self.identity, **content}


class InlineThread(SimpleNamespace):
    """A thread that has run when start() returns: what it posts is dealt with in the next turn."""

    def start(self) -> None:
        self.target(*getattr(self, "args", ()))

    def join(self, wait: float) -> None:
        """It has ended."""


class OrderedSet(dict[str, None]):
    """Instead of a set, whose order depends on the hash seed."""

    def add(self, item: str) -> None:
        self[item] = None

    def update(self, items: Iterable[str]) -> None:  # type: ignore[override]
        super().update(dict.fromkeys(items))

    def pop(self) -> str:  # type: ignore[override]
        return self.popitem()[0]


@dataclass(eq=False)
class Host:
    """A server: its kernel (bound addresses, cable) and its process (the agent, kazoo's threads, their memory)."""

    world: World
    name: str
    mac: bytes
    own: dict[int, str]
    powered: bool = True
    carrier: bool = True
    deaf: bool = False  # sends, but receives no frames of interest
    side: int = 0  # of a partition
    cut: bool = False  # from ZooKeeper
    proxy: bool = False  # answers for every address (proxy ARP)
    mute: bool = False  # its answers for virtual addresses are lost
    stopped: bool = False  # SIGSTOP
    starved: float = 0.0  # every turn comes up to so many seconds late
    boot: int = 0
    agent: link.Agent | None = None
    files: dict[str, Any] = field(default_factory=dict)
    bound: dict[link.Address, float] = field(default_factory=dict)  # and until when
    sick: set[str] = field(default_factory=set)  # health checks fail
    inbox: deque[link.Heard] = field(default_factory=lambda: deque(maxlen=256))
    held: list[Callable[[], None]] = field(default_factory=list)  # what kazoo's threads do once they run again
    changed: bool = False
    timers: list[float] = field(default_factory=list)
    expected: float = FOREVER
    wake_at: float = FOREVER
    states: dict[str, link.State] = field(default_factory=dict)
    kazoo: SimKazoo | None = None

    @property
    def on_wire(self) -> bool:
        return self.powered and self.carrier

    @property
    def runs(self) -> bool:
        """Whether its agent does its work."""
        return self.agent is not None and not self.stopped and not self.starved and self.agent.stopping is None

    @property
    def serves(self) -> bool:
        """Whether clients on the LAN reach its addresses."""
        return self.on_wire and not self.deaf and self.side == 0

    @property
    def reaches_zookeeper(self) -> bool:
        on_lan = self.world.zookeeper_on_lan and (not self.on_wire or self.side)
        return self.powered and not self.cut and not on_lan

    # -- the kernel

    def bind(self, ip: link.Address, until: float) -> None:
        new = ip not in self.bound
        self.bound[ip] = until
        if until < FOREVER:
            self.world.after(until - self.world.now, self.expire, ip)
        if new:
            self.netlink("binds", ip)

    def expire(self, ip: link.Address) -> None:
        if self.bound.get(ip, FOREVER) <= self.world.now:
            self.unbind(ip, "the lifetime ends of")

    def unbind(self, ip: link.Address, how: str = "unbinds") -> None:
        if self.bound.pop(ip, None) is not None:
            self.netlink(how, ip)

    def netlink(self, what: str, ip: link.Address | str = "") -> None:
        self.changed = True
        self.wake(self.world.now)
        self.world.note(self.name, what, str(ip))

    def answers(self, address: str) -> bool:
        bound = not self.mute and any(BARE(ip) == address for ip in self.bound)
        return bound or self.proxy or address in self.own.values()

    def hear(self, heard: link.Heard) -> None:
        if self.agent:
            self.inbox.append(heard)
            self.wake(self.world.now)

    # -- the process

    def start(self, keep: bool = True) -> None:
        """A new process; without `keep` its state directory was lost."""
        if self.agent or not self.powered:
            return
        if not keep:
            self.files.clear()
        self.stopped, self.wake_at, self.expected, self.kazoo = False, FOREVER, FOREVER, None
        self.inbox.clear(), self.held.clear(), self.timers.clear(), self.states.clear()
        world = self.world
        world.active = self

        def connect(agent: link.Agent) -> link.Coordinator:
            return link.Coordinator(config, world.clock.now, agent.post, agent.coordinator_changed)

        def check(check: link.HealthCheck, _: float) -> str:
            return "HTTP status 503" if check.host in self.sick else ""

        config = link.make_config({**world.config, "hostname": self.name}, {}, {})
        agent = SimAgent(config, SimNetwork(self), connect if world.zookeeper else None, world.clock, check)
        agent.host = self
        agent._dirty = OrderedSet()  # type: ignore[assignment]
        self.agent = agent
        agent.start()
        self.wake(world.now)
        world.note(self.name, "starts")

    def wake(self, when: float) -> None:
        """The loop goes round at that time: a little later, as timers and schedulers are."""
        if self.agent and not self.stopped and when < self.wake_at:
            late = self.world.rng.random() * (0.0005 + self.starved)
            when = max(when, self.world.clock.time) + late
            if when < self.wake_at:
                self.wake_at = when
                self.world.at(when, self.turn, when, self.agent)

    def turn(self, when: float, agent: link.Agent) -> None:
        if agent is not self.agent or when != self.wake_at or self.stopped:
            return
        self.wake_at, self.world.active = FOREVER, self
        done = agent.turn(self.expected)
        while self.timers and self.timers[0] <= when:
            heapq.heappop(self.timers)
        for address, managed in agent.vips.items():
            if self.states.get(address) is not managed.state:
                self.world.moved(self, managed, self.states.get(address))
                self.states[address] = managed.state
        if done:
            self.agent = None
            self.world.note(self.name, "has stopped")
            return
        self.expected = min(self.timers[0] if self.timers else FOREVER, agent.prober.due)
        self.wake(self.expected)

    def later(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        """Something that kazoo's threads do, in this process, if it is there and not stopped."""
        agent = self.agent

        def run() -> None:
            if self.stopped and agent is self.agent:
                self.held.append(run)
            elif agent is self.agent and agent:
                do(*args)

        self.world.after(delay, run)

    def kill(self) -> None:
        if self.kazoo and self.kazoo.line:
            self.kazoo.line.closed = True
        self.agent, self.stopped, self.starved = None, False, 0.0

    def sigterm(self) -> None:
        if self.agent:
            self.agent.post(self.agent.stop)

    def freeze(self) -> None:
        self.stopped = self.agent is not None

    def resume(self) -> None:
        if self.stopped:
            self.stopped, self.wake_at = False, FOREVER
            held, self.held = self.held, []
            for do in held:
                self.later(self.world.rng.uniform(0, 0.002), do)
            self.wake(self.world.now)

    def suspend(self) -> None:
        """The whole virtual machine: its kernel answers nothing, and what is sent to it is lost."""
        self.freeze()
        self.deaf = True

    def wake_up(self) -> None:
        self.deaf = False
        self.resume()

    def power_off(self) -> None:
        self.kill()
        self.powered, self.boot = False, self.boot + 1
        self.bound.clear()

    def power_on(self) -> None:
        if not self.powered:
            self.powered = True
            self.start()

    def cable(self, there: bool) -> None:
        if self.carrier != there:
            self.carrier = there
            self.netlink("has a carrier" if there else "has no carrier")

    def ask(self, call: str, address: str) -> None:
        """A request of the HTTP API, e.g. take_lock."""
        if self.agent:
            self.agent.post(self._asked, self.agent, call, address)

    def _asked(self, agent: link.Agent, call: str, address: str) -> None:
        try:
            future = getattr(agent, call)(address)
        except link.LinkError as error:
            self.world.note(self.name, f"{call}: {error} {error.body.get('detail', '')}")
        else:
            self.world.calls.append((agent, self.world.now, call, future))

    def managed(self, vip: str = VIPS[0]) -> link.Managed:
        assert self.agent
        return self.agent.find(vip)


class SimAgent(link.Agent):
    """The agent; the world is told when its loop wants to go round."""

    host: Host

    def at(self, when: float, function: Callable[..., Any], *args: Any) -> None:
        heapq.heappush(self.host.timers, when)
        super().at(when, function, *args)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        super().post(function, *args)
        self.host.wake(self.host.world.now)


class SimNetwork:
    """Network on the simulated wire and kernel."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def sync(self) -> tuple[link.Link, dict[link.Address, bool], dict[int, str]]:
        h = self._host
        own = {link.ipaddress.ip_interface(a): False for a in h.own.values()}
        state = link.Link(2, h.mac, h.carrier, h.carrier, "" if h.carrier else "eth0 has no carrier")
        return state, {**own, **dict.fromkeys(h.bound, True)}, dict(h.own)

    def adopt(self, addresses: Iterable[str]) -> None:
        """This kernel keeps IFA_PROTO."""

    def clear(self, interface: str, addresses: Iterable[str]) -> None:
        """There is one interface only."""

    def add(self, ip: link.Address, lifetime: int = 0) -> None:
        """The kernel looks for expired addresses now and then: up to half a second late."""
        slack = self._host.world.rng.uniform(0, 0.5)
        self._host.bind(ip, self._host.world.now + lifetime + slack if lifetime else FOREVER)

    def remove(self, ip: link.Address) -> None:
        self._host.unbind(ip)

    def send(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self._host.world.wire.send(self._host, frame)

    def receive(self) -> Iterator[link.Heard]:
        while self._host.inbox:
            yield self._host.inbox.popleft()

    def changed(self) -> bool:
        seen, self._host.changed = self._host.changed, False
        return seen

    def ready(self, ip: link.Address) -> bool:
        return True

    def gateways(self) -> list[str]:
        return [GATEWAY] if self._host.world.gateway.powered else []

    def files(self) -> list[int]:
        return []


class SimWire:
    """One LAN: frames are lost, late, or do not pass; kernels answer for what is bound."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = 0.0
        self.broken: set[tuple[str, str]] = set()  # (sender, receiver): no frame passes this way
        self.sent: Counter[tuple[str, str]] = Counter()  # (host, asks or claims): frames that agents sent

    def send(self, sender: Host, frame: bytes) -> None:
        heard, world = READ_FRAME(frame), self._world
        if not sender.on_wire or heard is None:
            return
        self.sent[sender.name, "asks" if heard.asks else "claims"] += 1
        if not heard.asks:
            world.claimed(sender, heard)
        for host in world.stations:
            if host is not sender and (heard.broadcast or host.mac == frame[:6]):
                self._pass(sender, host, heard)

    def _pass(self, sender: Host, to: Host, heard: link.Heard) -> None:
        chance = self._world.rng.random
        if not self.loss or chance() >= self.loss:
            self._world.after(0.0002 + 0.0018 * chance(), self._arrive, sender, to, heard)

    def _arrive(self, sender: Host, to: Host, heard: link.Heard) -> None:
        if not to.on_wire or to.deaf or to.side != sender.side or (sender.name, to.name) in self.broken:
            return
        if heard.asks and sender.on_wire and to.answers(heard.address):
            self._pass(to, sender, link.Heard(heard.address, to.mac, False, False))
        to.hear(heard)


@dataclass(eq=False)
class Line:
    """A TCP connection to ZooKeeper: keeps the order, holds what cannot pass, delivers it late, or never."""

    host: Host
    session: int = 0
    closed: bool = False  # by the client: what it sent may still arrive
    waits: bool = False  # for a commit
    last: list[float] = field(default_factory=lambda: [0.0, 0.0])
    held: list[tuple[bool, Callable[[], None]]] = field(default_factory=list)

    def carry(self, up: bool, do: Callable[[], None]) -> None:
        world = self.host.world
        self.last[up] = max(self.last[up], world.now + world.rng.uniform(0.0005, 0.0025))
        world.at(self.last[up], self._arrive, up, do)

    def _arrive(self, up: bool, do: Callable[[], None]) -> None:
        if self.held or not self.host.reaches_zookeeper:
            if not self.held:
                self.host.world.after(0.2, self._again)
            self.held.append((up, do))
        elif up or not self.closed:
            do()

    def _again(self) -> None:
        """TCP retransmits."""
        if self.host.powered and not self.host.reaches_zookeeper:
            self.host.world.after(0.2, self._again)
        else:
            held, self.held = self.held, []
            for up, do in held if self.host.powered else ():
                self._arrive(up, do)


class SimZooKeeper:
    """The ensemble as one server: sessions, a tree of nodes, watches that fire once."""

    def __init__(self, world: World, timeout: float, tick: float) -> None:
        self._world, self.timeout, self._tick = world, timeout, tick
        self.up, self.zxid = True, 0
        self.stalled = False  # nothing is committed; what any server can answer is
        self.sessions: dict[int, float] = {}  # and when they end
        self.lines: dict[int, Line] = {}
        self.nodes: dict[str, tuple[bytes, int]] = {}  # path -> data and owner
        self._watches: dict[tuple[str, str], dict[Line, None]] = {}
        self._numbers = itertools.count(1)
        world.after(tick, self._expire)

    def _expire(self) -> None:
        for session, ends in list(self.sessions.items()) if self.up else ():
            if ends <= self._world.now:
                self._world.note("ZooKeeper", f"session {session} has expired")
                self.end(session)
        self._world.after(self._tick, self._expire)

    def touch(self, session: int) -> None:
        """Sessions end at ticks, never early."""
        self.sessions[session] = math.ceil((self._world.now + self.timeout) / self._tick) * self._tick

    def stop(self) -> None:
        """All servers die: connections are reset."""
        self.up = False
        for line in list(self.lines.values()):
            self._reset(line)

    def begin(self, wiped: bool = False) -> None:
        """Sessions have outlived the outage, and get a fresh timeout; unless the data is gone."""
        if wiped:
            self.sessions, self.nodes, self._watches, self.zxid = {}, {}, {}, 0
        for session in () if self.up else self.sessions:
            self.touch(session)
        self.up = True

    def _reset(self, line: Line) -> None:
        del self.lines[line.session]
        if line.host.reaches_zookeeper and line.host.kazoo:
            line.host.later(0.001, line.host.kazoo.disconnected, line)

    def attach(self, line: Line, session: int, zxid: int) -> int:
        """The session, 0 where it has ended, -1 where the client has seen more than this server."""
        if zxid > self.zxid:
            return -1
        if session and session not in self.sessions:
            return 0
        line.session = session or next(self._numbers) + 0x1000
        if line.session in self.lines:
            self._reset(self.lines[line.session])
        self.lines[line.session] = line
        self.touch(line.session)
        return line.session

    def end(self, session: int) -> None:
        """Its nodes go with it."""
        self.sessions.pop(session, None)
        for path in [path for path, (_, owner) in self.nodes.items() if owner == session]:
            self.delete(path)
        if session in self.lines:
            self._reset(self.lines[session])

    def call(self, line: Line, call: str, *args: Any, watch: bool = False, **more: Any) -> Any:
        """Carry out a request: the answer, or the exception that is one."""
        try:
            answer = getattr(self, call)(*args, **({"owner": line.session} if call == "create" else {}), **more)
        except kazoo.ZookeeperError as error:
            return error
        if watch:
            self._watches.setdefault((call, args[0]), {})[line] = None
        return answer

    def _changed(self, *keys: tuple[str, str]) -> None:
        self.zxid += 1
        for key in keys:
            for line in self._watches.pop(key, {}):
                if self.lines.get(line.session) is line and line.host.kazoo:
                    line.carry(False, functools.partial(line.host.kazoo.fire, key))

    def children(self, path: str) -> list[str]:
        return [node.rpartition("/")[2] for node in self.nodes if node.rpartition("/")[0] == path]

    def get(self, path: str) -> tuple[bytes, Any]:
        if path not in self.nodes:
            raise kazoo.NoNodeError
        return self.nodes[path][0], SimpleNamespace(ephemeralOwner=self.nodes[path][1])

    def exists(self, path: str) -> Any:
        return self.get(path)[1] if path in self.nodes else None

    def sync(self, path: str) -> str:
        return path

    def get_children(self, path: str) -> list[str]:
        self.get(path)
        return self.children(path)

    def create(self, path: str, data: bytes = b"", owner: int = 0, sequence: bool = False, **_: Any) -> None:
        """All that LinK creates is ephemeral, with its parents."""
        parent = path.rpartition("/")[0]
        if owner:
            self.ensure_path(parent)
        path += f"{next(self._numbers):010d}" * sequence
        if path in self.nodes:
            raise kazoo.NodeExistsError
        self.nodes[path] = data, owner
        self._changed(("get_children", parent), ("exists", path))

    def ensure_path(self, path: str) -> None:
        for end in [n for n, letter in enumerate(path + "/") if letter == "/"][1:]:
            if path[:end] not in self.nodes:
                self.create(path[:end])

    def set(self, path: str, data: bytes) -> None:
        self.nodes[path] = data, self.get(path)[1].ephemeralOwner
        self._changed(("get", path), ("exists", path))

    def delete(self, path: str) -> None:
        self.get(path)
        if self.children(path):
            raise kazoo.NotEmptyError
        del self.nodes[path]
        self._changed(("get_children", path.rpartition("/")[0]), ("get", path), ("exists", path))

    def multi(self, check: str, delete: list[str]) -> list[Any]:
        if not {check, *delete} <= set(self.nodes):
            return [kazoo.NoNodeError()]
        self._world.note("ZooKeeper", f"breaks a lock: {delete[0].split('/')[3]}")
        for path in delete:
            self.delete(path)
        return [True]


class Result:
    """kazoo's IAsyncResult."""

    value: Any = None
    exception: Any = None

    def rawlink(self, then: Callable[[Any], None]) -> None:
        self.then = then

    def answer(self, answer: Any) -> None:
        failed = isinstance(answer, Exception)
        self.value, self.exception = (None, answer) if failed else (answer, None)
        self.then(self)


class SimKazoo:
    """A KazooClient as link.Coordinator uses it: kazoo's threads, its states, its queue while it is not connected."""

    def __init__(self, host: Host, session: tuple[int, bytes] | None) -> None:
        self._host, self._server, self._rng = host, host.world.server, host.world.rng
        self.client_id, self.last_zxid = session, 0
        self._connection = SimpleNamespace(_connect=lambda: (self._server.timeout * 2000 / 3, 0), _invoke=None)
        shut = lambda how: self.line and host.later(0.0, self.disconnected, self.line)  # noqa: E731
        self.handler = SimpleNamespace(connection=SimpleNamespace(shutdown=shut))
        self._say: Callable[[str], None] = lambda state: None
        self._calls: dict[Result, Callable[[Line], Any]] = {}  # what waits for an answer, sent or not
        self._watches: dict[tuple[str, str], dict[Callable[[Any], None], None]] = {}
        self._heard_at = 0.0
        self.line: Line | None = None
        self.handler = SimpleNamespace(connection=self)  # as link's own handler keeps its socket

    def shutdown(self, how: int) -> None:
        """The socket is shut down by link: kazoo's thread finds its end."""
        if self.line:
            self._host.later(0.001, self.disconnected, self.line)

    def add_listener(self, listener: Callable[[str], None]) -> None:
        self._say = listener

    def start_async(self) -> None:
        self._host.kazoo = self
        self._host.later(0.002, self._connect)
        self._host.later(self._server.timeout / 3, self._beat)

    def stop(self) -> None:
        if line := self.line:
            line.carry(True, lambda: self._server.end(line.session) if line.session in self._server.sessions else None)

    def __getattr__(self, name: str) -> Any:
        """All requests: <call>_async."""
        if not name.endswith("_async"):
            raise AttributeError(name)
        return functools.partial(self._ask, name.removesuffix("_async"))

    def transaction(self) -> Any:
        checked, deleted = list[str](), list[str]()
        commit = lambda: self._ask("multi", checked[0], deleted)  # noqa: E731
        return SimpleNamespace(check=lambda path, _: checked.append(path), delete=deleted.append, commit_async=commit)

    def _ask(self, call: str, *args: Any, watch: Callable[[Any], None] | None = None, **more: Any) -> Result:
        result = Result()

        def at_client(answer: Any) -> None:
            if self._calls.pop(result, None):
                if watch and not isinstance(answer, Exception):
                    self._watches.setdefault((call, args[0]), {})[watch] = None
                self._heard_at, self.last_zxid = self._host.world.now, self._server.zxid
                result.answer(answer)

        def at_server(line: Line) -> None:
            line.waits = self._server.stalled and (line.waits or call in ("sync", "multi"))
            if line.waits:  # ZooKeeper answers one client's requests in their order
                self._host.world.after(0.02, at_server, line)
            elif self._server.lines.get(line.session) is line:
                self._server.touch(line.session)
                answer = self._server.call(line, call, *args, watch=bool(watch), **more)
                line.carry(False, lambda: at_client(answer))

        self._calls[result] = lambda line: line.carry(True, lambda: at_server(line))
        if self.line and self.line.session:
            self._calls[result](self.line)
        return result

    def fire(self, key: tuple[str, str]) -> None:
        for watch in self._watches.pop(key, ()):
            watch(None)

    def _connect(self) -> None:
        if not self._server.up or not self._host.reaches_zookeeper:
            self._host.later(self._rng.uniform(0.1, 0.5), self._connect)
            return
        self.line, self._heard_at = line, _ = Line(self._host), self._host.world.now
        session = self.client_id[0] if self.client_id else 0

        def at_server() -> None:
            number = self._server.attach(line, session, self.last_zxid) if self._server.up else -1
            line.carry(False, lambda: self._host.later(0, self._attached, line, number))

        line.carry(True, at_server)

    def _attached(self, line: Line, number: int) -> None:
        if line is not self.line:
            return
        if number <= 0:
            line.closed, self.line = True, None
            if number == 0:
                self.client_id = None
                self._say("LOST")
            self._host.later(self._rng.uniform(0.1, 0.5) if number else 0.0, self._connect)
            return
        self._heard_at, self.client_id = self._host.world.now, (number, b"secret")
        self._connection._connect()
        self._say("CONNECTED")
        for send in list(self._calls.values()):
            send(line)

    def disconnected(self, line: Line) -> None:
        """Everything that is asked has no answer, every watch fires, and on with the next try."""
        if line is self.line:
            line.closed, self.line = True, None
            calls, self._calls = self._calls, {}
            for result in calls:
                result.answer(kazoo.ConnectionLoss())
            self._say("SUSPENDED")
            for key in list(self._watches):
                self.fire(key)
            self._host.later(0.0 if self._server.stalled else self._rng.uniform(0.1, 0.5), self._connect)

    def _beat(self) -> None:
        """kazoo's own pings keep the session, and find a dead connection after two thirds of the timeout."""
        line, now = self.line, self._host.world.now
        self._host.later(self._server.timeout / 6, self._beat)
        if line and now - self._heard_at > self._server.timeout * 2 / 3:
            self.disconnected(line)
        elif line and line.session:
            line.carry(True, functools.partial(self._beat_at_server, line))

    def _beat_at_server(self, line: Line) -> None:
        if self._server.lines.get(line.session) is line:
            self._server.touch(line.session)
            line.carry(False, lambda: setattr(self, "_heard_at", self._host.world.now))


class World:
    """Hosts, wire, ZooKeeper and an observer who sees everything, in virtual time."""

    def __init__(
        self, seed: int = 0, hosts: int = 3, vips: Iterable[str] = VIPS[:1], zookeeper: bool = True, **config: Any
    ) -> None:
        self.rng = random.Random(seed)
        self.clock = SimClock()
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self.vips = [link.ipaddress.ip_interface(vip) for vip in vips]
        self.zookeeper, self.zookeeper_on_lan = zookeeper, False
        check, tick = config.pop("checks", False), config.pop("tick", 0.5)
        checks = {vip: [{"type": "HTTP", "host": str(vip.ip), "port": 80}] * check for vip in self.vips}
        ips = [{"ip": str(vip), "checks": checks[vip], "healthcheck_interval": 1} for vip in self.vips]
        self.config = {"interface": "eth0", "state_dir": "/nowhere", "ips": ips, **config}
        self.config["zookeeper"] = "zookeeper:2181" if zookeeper else ""
        self.server = SimZooKeeper(self, config.get("session_timeout", 4.0), tick)
        self.wire = SimWire(self)
        macs = self.rng.sample(range(1, 250), hosts)
        own = [{4: f"192.0.2.{n}", 6: f"fe80::{n}"} for n in range(hosts + 1)]
        self.hosts = [Host(self, f"h{n}", bytes((2, 0, 0, 0, 0, m)), own[n]) for n, m in enumerate(macs, 1)]
        self.gateway = Host(self, "gateway", b"\x02\0\0\0\0\xfe", {4: GATEWAY})
        self.stations = [*self.hosts, self.gateway]
        self.active = self.gateway  # whose code runs
        self.history: list[str] = []
        self.transitions = 0
        self.calls: list[tuple[link.Agent, float, str, Any]] = []
        self.wrong: list[str] = []
        self.gaps: dict[str, float] = {}  # per VIP: since when nobody serves it although somebody could
        self.twos: dict[tuple[str, str, str], float] = {}  # two that hear each other have a VIP: since when
        self.gap_limit = self.two_limit = FOREVER
        self.worst_gap = self.worst_two = 0.0
        self._patches = ExitStack()

    def __enter__(self) -> World:
        put = self._patches.enter_context
        frames = lambda address, mac, own: BUILD_FRAMES(address, mac, own.get(6))  # noqa: E731
        store = lambda config, mac: SimStore(config, mac, self.active.files)  # noqa: E731
        client = lambda config, servers, session: SimKazoo(self.active, session)  # noqa: E731
        put(mock.patch.multiple(link, Store=store, build_frames=frames, _kazoo_client=client, random=self.rng))
        put(mock.patch.object(link, "boot_id", lambda: f"{self.active.name}-{self.active.boot}"))
        put(mock.patch.object(link, "threading", SimpleNamespace(Thread=InlineThread)))
        put(mock.patch.multiple(os, eventfd=lambda *_: 0, eventfd_write=lambda *_: None, eventfd_read=lambda *_: 0))
        put(mock.patch.object(link.log, "level", logging.INFO if VERBOSE else logging.CRITICAL))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.close()

    # -- time

    @property
    def now(self) -> float:
        return self.clock.time

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self._count), do, args))

    def after(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (self.clock.time + delay, next(self._count), do, args))

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> float:
        """Go on so long, or until something is true; the seconds that it took."""
        events, clock, began = self.events, self.clock, self.clock.time
        end = began + seconds
        while events[0][0] <= end and not (until and until()):
            clock.time, _, do, args = heapq.heappop(events)
            do(*args)
        if not (until and until()):
            clock.time = end
        return clock.time - began

    # -- what the observer sees

    def note(self, who: str, what: str, more: str = "") -> None:
        line = f"{self.now - 1000:9.4f} {who:9} {what} {more}"
        self.history.append(line)
        if VERBOSE:
            print(line)
        self.look()

    def moved(self, host: Host, managed: link.Managed, old: link.State | None) -> None:
        self.note(host.name, f"{managed.vip.ip} is {managed.state.value}", managed.reason)
        self.transitions += old is not None
        if not managed.reason:
            self.wrong.append(f"{self.now - 1000:.3f} {host.name} gives no reason for {managed.state.value}")

    def claimed(self, sender: Host, heard: link.Heard) -> None:
        """An announcement is sent: who announces must have the address."""
        if not any(BARE(ip) == heard.address for ip in sender.bound):
            self.wrong.append(f"{self.now - 1000:.3f} {sender.name} announces {heard.address}, which it has not")

    def binders(self, vip: link.Address | None = None) -> list[Host]:
        return [host for host in self.hosts if (vip or self.vips[0]) in host.bound]

    def holder(self, vip: link.Address | None = None) -> Host:
        (host,) = self.binders(vip)
        return host

    def others(self) -> list[Host]:
        """The standbys, in the order of the queue."""
        queue = [name for name, _, _ in self.queue()]
        order = sorted(self.hosts, key=lambda h: queue.index(h.name) if h.name in queue else 99)
        return [host for host in order if host is not self.holder()]

    def queue(self, vip: link.Address | None = None) -> list[tuple[str, int, str]]:
        """The contenders' names, sessions and nodes, as ZooKeeper has them."""
        root, nodes = f"/link/ips/{(vip or self.vips[0]).ip}/", self.server.nodes
        paths = sorted((path for path in nodes if path.startswith(root)), key=lambda path: path[-10:])
        return [(nodes[path][0].decode(), nodes[path][1], path) for path in paths]

    def look(self) -> None:
        """Time the gaps and the doubles; called whenever something may have changed."""
        stray = any((h.side or h.deaf) and h.reaches_zookeeper for h in self.hosts) and self.zookeeper
        able = any(host.serves and host.runs for host in self.hosts) and not stray
        strict = self.config.get("promise") == "at-most-one"
        for vip in self.vips:
            binders = self.binders(vip)
            self._time(self.gaps, (vip,), able and not any(h.serves for h in binders), "nobody has it")
            for pair in itertools.combinations(self.hosts, 2):
                a, b = pair
                hear = a.side == b.side and all(h in binders and h.on_wire and not h.deaf and h.runs for h in pair)
                self._time(self.twos, (vip, a.name, b.name), hear, "two have it")
            if strict and len(binders) > 1:
                self.wrong.append(f"{self.now - 1000:.3f} {vip}: {len(binders)} hosts have it")

    def _time(self, table: dict[Any, float], key: tuple[Any, ...], wrong: bool, what: str) -> None:
        if wrong:
            table.setdefault(key, self.now)
        elif key in table:
            self._judge(table, key, what)

    def _judge(self, table: dict[Any, float], key: tuple[Any, ...], what: str) -> None:
        took = self.now - table.pop(key)
        limit = self.gap_limit if table is self.gaps else self.two_limit
        worst = "worst_gap" if table is self.gaps else "worst_two"
        setattr(self, worst, max(getattr(self, worst), took))
        if took > limit:
            where = " ".join(map(str, key))
            self.wrong.append(f"{self.now - 1000:.3f} {where}: {what} for {took:.3f} s (limit {limit})")

    def disturb(self) -> None:
        """Something new has happened: the patience with a gap begins anew; what was wrong before is judged."""
        for key in list(self.gaps):
            self._judge(self.gaps, key, "nobody has it")
        self.look()

    # -- what happens to the hosts

    def begin(self, *hosts: Host, rest: float = 4.0) -> World:
        """Start these hosts (none: all, one after another) and wait until all is quiet."""
        for host in hosts or self.hosts:
            host.start()
            self.run(0.05)
        self.run(rest)
        self.worst_gap = self.worst_two = 0.0
        return self

    def fault(self, kind: str, host: Host, vip: link.Address, on: bool) -> None:
        """Begin or end a fault. Each end may come twice, and after others."""
        self.note("fault", kind if on else f"end of {kind}", host.name)
        address = str(vip.ip)
        acts: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "power": (host.power_off, host.power_on),
            "cable": (lambda: host.cable(False), lambda: host.cable(True)),
            "isolate": (lambda: setattr(host, "side", 1), lambda: setattr(host, "side", 0)),
            "deaf": (lambda: setattr(host, "deaf", True), lambda: setattr(host, "deaf", False)),
            "cut": (lambda: setattr(host, "cut", True), lambda: setattr(host, "cut", False)),
            "zookeeper": (self.server.stop, self.server.begin),
            "freeze": (host.freeze, host.resume),
            "starve": (lambda: setattr(host, "starved", 0.4), lambda: setattr(host, "starved", 0.0)),
            "kill": (host.kill, host.start),
            "forget": (host.kill, lambda: host.start(keep=False)),
            "sigterm": (host.sigterm, lambda: (host.kill(), host.start())),
            "sick": (lambda: host.sick.add(address), lambda: host.sick.discard(address)),
            "all sick": (
                lambda: [h.sick.add(address) for h in self.hosts],
                lambda: [h.sick.discard(address) for h in self.hosts],
            ),
            "unbind": (lambda: host.unbind(vip, "an operator unbinds"), lambda: None),
            "unlock": (lambda: [self.server.delete(path) for _, _, path in self.queue(vip)[:1]], lambda: None),
            "lock": (lambda: host.ask("take_lock", address), lambda: None),
            "failover": (lambda: [h.ask("failover", address) for h in self.binders(vip)], lambda: None),
        }
        acts[kind][not on]()
        self.disturb()

    def heal(self) -> None:
        """All faults end."""
        self.wire.loss = 0.0
        self.server.begin()
        for host in self.hosts:
            host.side, host.deaf, host.cut, host.starved = 0, False, False, 0.0
            host.sick.clear()
            host.resume()
            host.power_on()
            host.cable(True)
            if host.agent and host.agent.stopping is not None:
                host.kill()
            host.start()
        self.note("fault", "all healed")
        self.disturb()

    def settled(self, quiet: float = 10.0) -> None:
        """Exactly one host has each address, it is the lock's owner, and nothing moves any more."""
        for key in list(self.gaps):
            self._judge(self.gaps, key, "nobody has it")
        for key in list(self.twos):
            self._judge(self.twos, key, "two have it")
        self.look()
        before = len(self.history), self.transitions
        for _ in range(2):
            for vip in self.vips:
                names = [host.name for host in self.binders(vip)]
                queue = [(name, session) for name, session, _ in self.queue(vip)]
                owner = [(n, k.client_id[0]) for n in names if (k := self.host(n).kazoo) and k.client_id]
                if len(names) != 1 or (self.zookeeper and queue[:1] != owner):
                    self.wrong.append(f"{self.now - 1000:.3f} {vip}: bound on {names}, queue {queue}")
                states = {h.name: h.states.get(str(vip.ip)) for h in self.hosts}
                if [n for n, s in states.items() if s is link.State.ACTIVATED] != names:
                    self.wrong.append(f"{self.now - 1000:.3f} {vip}: bound on {names}, states {states}")
            self.run(quiet)
        if (len(self.history), self.transitions) != before:
            self.wrong.append("no rest: " + " | ".join(self.history[before[0] :][:6]))
        for agent, when, call, future in self.calls:
            if not future.done() and any(host.agent is agent for host in self.hosts):
                self.wrong.append(f"{call} at {when - 1000:.3f} was never answered")

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)


# ----------------------------------------------------------------------------
# Storms: seeded schedules of faults
# ----------------------------------------------------------------------------

KINDS = ("power", "cable", "isolate", "freeze", "starve", "kill", "forget", "sigterm", "unbind", "sick", "all sick")
ZOOKEEPER_KINDS = ("zookeeper", "cut", "deaf", "lock", "failover", "unlock")


def storm(seed: int) -> World:
    """One run: a random configuration, random faults, then peace; what is wrong is in `wrong`."""
    rng = random.Random(seed)
    zookeeper = rng.random() < 0.65
    strict = zookeeper and rng.random() < 0.25
    timeout, tick = (rng.choice((2.0, 4.0, 6.0)), rng.choice((0.1, 0.5, 2.0))) if zookeeper else (0.0, 0.1)
    config = {"session_timeout": timeout, "promise": "at-most-one"} if strict else {"session_timeout": timeout or 4.0}
    sick = rng.random() < 0.3
    world = World(seed, vips=VIPS[: rng.randint(1, 3)], zookeeper=zookeeper, checks=sick, tick=tick, **config)
    with world:
        world.zookeeper_on_lan = rng.random() < 0.5
        world.gateway.powered = rng.random() < 0.7
        world.wire.loss = rng.choice((0.0, 0.0, 0.01))
        together = rng.choice((0.0, 0.001, 1.0))
        for host in world.hosts:
            world.after(rng.uniform(0, together), host.start)
        world.run(timeout + tick + 2)
        # Binders without a confirmed lock look for a rival on one VIP each 0.4 s; one that is found leads to all.
        world.two_limit = FOREVER if strict else 1.2 + 0.4 * (len(world.vips) - 1)
        world.gap_limit = FOREVER if strict else timeout + tick + 1.5
        kinds = [*KINDS[: None if sick else -2], *(ZOOKEEPER_KINDS if zookeeper else ())]
        kinds = [kind for kind in kinds if not (strict and kind == "unlock")]
        for _ in range(rng.randint(1, 7)):
            kind, host, vip = rng.choice(kinds), rng.choice(world.hosts), rng.choice(world.vips)
            begin = world.now + rng.uniform(0, 12)
            last = rng.choice((0.05, 0.3, 1.5, 4.0, 9.0)) * rng.uniform(0.5, 1.5)
            world.at(begin, world.fault, kind, host, vip, True)
            world.at(begin + last, world.fault, kind, host, vip, False)
        world.run(rng.choice((13, 26)))
        world.heal()
        world.events = [e for e in world.events if e[2] != world.fault]
        heapq.heapify(world.events)
        world.run(timeout + tick + 3)
        world.settled()
    return world


def test_many_seeds_of_faults_end_with_exactly_one_holder() -> None:
    first, _, last = os.environ.get("SEEDS", "200").rpartition(":")
    failed = {}
    for seed in range(int(first or 0), int(last)):
        if wrong := storm(seed).wrong:
            failed[seed] = wrong[:3]
    assert not failed, f"{len(failed)} seeds: {failed}"


# ----------------------------------------------------------------------------
# Scenarios: each fails where its rule is taken out of link.py
# ----------------------------------------------------------------------------

@contextmanager
def resting(seed: int, rest: float = 4.0, **config: Any) -> Iterator[World]:
    """All hosts started, one after another, and all quiet."""
    with World(seed, **config) as world:
        yield world.begin(rest=rest)


def public(cls: type) -> dict[str, str]:
    functions = {name: thing for name, thing in vars(cls).items() if callable(thing) and not name.startswith("_")}
    return {name: str(inspect.signature(thing)).replace("link.", "") for name, thing in functions.items()}


def test_the_simulated_ports_have_the_signatures_of_the_real_ones() -> None:
    assert public(SimNetwork) == public(link.Network)
    assert public(SimClock) == public(link.Clock)
    assert public(SimStore).items() <= public(link.Store).items()


def test_the_same_seed_is_the_same_run_whatever_the_hash_seed() -> None:
    program = "import test_sim; w = test_sim.storm(8); print(w.history, sorted(w.wire.sent.items()))"
    paths = os.pathsep.join(os.path.dirname(os.path.abspath(file)) for file in (__file__, link.__file__))
    command = [sys.executable, "-c", program.replace("test_sim", __name__)]
    env = {**os.environ, "PYTHONPATH": paths}
    runs = [subprocess.check_output(command, env={**env, "PYTHONHASHSEED": seed}) for seed in "12"]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("fault", ["power", "cable", "isolate"])
def test_with_zookeeper_a_dead_holder_is_replaced_within_350_ms(fault: str) -> None:
    for seed in range(10):
        with resting(seed) as w:
            w.zookeeper_on_lan = True
            dead = w.holder()
            w.fault(fault, dead, w.vips[0], True)
            assert w.run(5, until=lambda w=w, dead=dead: any(h is not dead for h in w.binders())) < 0.35, seed
            w.run(10)
            w.fault(fault, dead, w.vips[0], False)
            assert w.run(1, until=lambda w=w: len(w.binders()) == 1) < 1, seed
            w.run(10)
            w.settled()
            assert not w.wrong


def test_a_holder_that_takes_its_zookeeper_along_is_replaced_as_soon() -> None:
    for seed in range(20):
        with resting(seed) as w:
            dead = w.holder()
            w.run(seed * 0.007)
            for host in w.others():
                host.cut = True  # connected, but their server's leader was on the dead host: no answer
            dead.power_off()
            assert w.run(5, until=lambda w=w, dead=dead: any(h is not dead for h in w.binders())) < 0.22, seed


def test_a_dead_holder_is_replaced_as_soon_while_zookeeper_commits_nothing() -> None:
    for seed in range(50):
        with resting(seed) as w:
            dead = w.holder()
            w.run(seed * 0.007)
            w.server.stalled = True
            for host in w.others():
                host.starved = 0.02  # its loop learns in the same turn that the connection was lost and is there again
            dead.power_off()
            assert w.run(1, until=lambda w=w, dead=dead: any(h is not dead for h in w.binders())) < 0.28, seed
            w.run(0.5)
            w.server.stalled = False
            w.heal()
            w.run(8)
            w.settled()
            assert not w.wrong and not w.worst_two, (seed, w.wrong, w.worst_two)


@pytest.mark.parametrize("hosts", [2, 3])
def test_a_holder_that_never_answered_in_this_term_is_not_accused(hosts: int) -> None:
    with World(1, hosts=hosts) as w:
        first, w.zookeeper_on_lan, w.gateway.powered = w.hosts[0], False, hosts == 3
        first.side = 1  # cut from the LAN, not from ZooKeeper
        w.begin(first).begin(*w.hosts[1:], rest=20)
        assert w.binders() == [first] and w.transitions == 1


def test_a_deaf_standby_with_a_witness_accuses_nobody() -> None:
    for seed in range(5):
        with resting(seed) as w:
            holder, first = w.holder(), w.others()[0]
            first.deaf = True
            w.run(20)
            first.deaf = False
            w.run(20)
            assert w.holder() is holder and w.transitions == 1, seed


@pytest.mark.parametrize("zookeeper", [True, False])
def test_proxy_arp_neither_hides_a_death_nor_fakes_a_holder(zookeeper: bool) -> None:
    with resting(2) as w:
        w.gateway.proxy = True
        w.run(5)
        if not zookeeper:
            w.server.stop()
            w.run(10)
        dead = w.holder()
        dead.power_off()
        assert w.run(5, until=lambda: len(w.binders()) == 1) < 1
        w.run(5)
        assert len(w.binders()) == 1


@pytest.mark.parametrize("broken", ["two hosts, the standby deaf, no witness", "three hosts whose answers are lost"])
def test_half_broken_links_do_not_send_the_vip_to_and_fro(broken: str) -> None:
    """Each take-over is contested, each pause is longer than the one before."""
    with World(3, hosts=3 if "three" in broken else 2) as w:
        w.zookeeper_on_lan = w.gateway.powered = False
        w.begin()
        w.others()[0].deaf = "deaf" in broken
        for host in w.hosts:
            host.mute = "lost" in broken
        moves = []
        for _ in range(4):
            before = len(w.history)
            w.run(30)
            moves.append(str(w.history[before:]).count(" binds "))
        assert moves[0] <= 15 and moves[-1] <= 3, moves


def test_who_loses_its_lock_by_a_false_accusation_does_not_accuse_back() -> None:
    with resting(4, hosts=2) as w:
        victim, accuser = w.holder(), w.others()[0]
        victim.mute = True
        w.run(2, until=lambda: accuser in w.binders())
        accuser.mute = True  # now the accuser's answers are lost, too
        w.run(0.9)
        assert w.queue()[0][0] == accuser.name


def test_a_host_that_rejoins_while_the_holder_is_cut_off_from_zookeeper_is_no_stranger() -> None:
    with resting(3, checks=True) as w:
        holder, (other, third) = w.holder(), w.others()
        w.fault("sick", third, w.vips[0], True)  # known, and no candidate
        w.fault("power", other, w.vips[0], True)
        w.run(8)  # its session has ended, and the holder has seen its record go
        w.fault("cut", holder, w.vips[0], True)
        w.fault("power", other, w.vips[0], False)
        w.run(12)  # now the holder's has, too, and the lock goes to who came back
        assert w.binders() == [other] and w.worst_two < 1
        w.fault("cut", holder, w.vips[0], False)
        w.run(8)
        w.settled()
        assert not w.wrong


def test_an_agent_stopped_beyond_its_session_looks_before_it_announces() -> None:
    for seed in range(10):
        with resting(seed, announce_interval=1.0) as w:
            old = w.holder()
            old.freeze()
            w.run(9)
            assert len(w.binders()) == 2  # a hung host's kernel goes on answering: the session is for that
            claims = w.wire.sent[old.name, "claims"]
            old.resume()
            assert w.run(3, until=lambda w=w: len(w.binders()) == 1) < 1, seed
            assert w.holder() is not old and w.wire.sent[old.name, "claims"] == claims, seed


def test_an_unconfirmed_binder_that_was_stopped_looks_before_it_announces() -> None:
    """Stopped, and cut off at the same time, so that another one took over; both end at the same instant."""
    for seed in range(20):
        with resting(seed, zookeeper=False, announce_interval=1.0) as w:
            old = w.holder()
            old.freeze()
            old.side = 1
            w.run(5)
            claims, old.side, w.gap_limit = w.wire.sent[old.name, "claims"], 0, 0.3
            old.resume()
            assert w.run(3, until=lambda w=w: len(w.binders()) == 1) < 1, seed
            assert w.wire.sent[old.name, "claims"] == claims, seed
            w.run(5)
            w.settled(5)
            assert not w.wrong, seed


def test_three_agents_that_start_at_the_same_instant_without_zookeeper_agree_on_one() -> None:
    two = 0
    for seed in range(100):
        with World(seed, zookeeper=False) as w:
            for host in w.hosts:
                host.start()
            w.run(1)
            assert len(w.binders()) == 1 and w.worst_two < 0.1, seed
            two += w.worst_two > 0
    assert two <= 10  # most see the others' last probes, and wait


@pytest.mark.parametrize("vips", [1, 20])
def test_of_two_unconfirmed_binders_the_lower_mac_is_left_within_a_second_of_the_heal(vips: int) -> None:
    for seed in range(20 if vips == 1 else 4):
        addresses = [f"192.0.2.{n}/32" for n in range(101, 101 + vips)]
        with resting(seed, vips=addresses, zookeeper=False) as w:
            lonely = w.holder()
            lonely.side = 1
            w.run(5)
            best = min((h for h in w.binders()), key=lambda h: h.mac)
            lonely.side = 0
            assert w.run(3, until=lambda w=w: all(len(w.binders(vip)) == 1 for vip in w.vips)) < 1.05, seed
            assert all(w.binders(vip) == [best] for vip in w.vips), seed
            w.settled(5)
            assert not w.wrong


@pytest.mark.parametrize("since", [0.3, 20])
@pytest.mark.parametrize("fault", ["power", "isolate"])
def test_with_zookeeper_dead_a_dead_holder_is_replaced_within_half_a_second(fault: str, since: float) -> None:
    for seed in range(10):
        with resting(seed) as w:
            dead = w.holder()
            w.server.stop()
            w.run(since)
            assert w.binders() == [dead] and w.worst_two == 0
            w.fault(fault, dead, w.vips[0], True)
            assert w.run(5, until=lambda w=w, dead=dead: any(h is not dead for h in w.binders())) < 0.5, seed
            w.run(2)
            assert len([h for h in w.binders() if h is not dead]) == 1 and w.worst_two < 0.1, seed


def test_zookeeper_may_be_dead_for_a_minute_and_nothing_moves() -> None:
    with resting(5, vips=VIPS) as w:
        before = len(w.history)
        w.server.stop()
        w.run(60)
        w.server.begin()
        w.run(10)
        assert len(w.history) == before
        w.settled()
        assert not w.wrong


@pytest.mark.parametrize("zookeeper", [True, False])
def test_while_all_checks_fail_the_vip_stays_and_when_its_host_dies_one_failing_host_binds(zookeeper: bool) -> None:
    for seed in range(10):
        with resting(seed, zookeeper=zookeeper, checks=True) as w:
            holder, address = w.holder(), str(w.vips[0].ip)
            for host in sorted(w.hosts, key=lambda h: h is holder):
                host.sick.add(address)
                w.run(5)
            w.run(20)
            assert w.binders() == [holder] and set(holder.states.values()) == {link.State.FAILING}, seed
            holder.power_off()
            assert w.run(10, until=lambda w=w: bool(w.binders())) < 7, seed
            w.run(10)
            assert len(w.binders()) == 1, seed
            w.heal()
            w.run(8)
            w.settled()
            assert not w.wrong, seed


def test_a_check_that_fails_everywhere_at_the_same_time_and_recovers_moves_nothing() -> None:
    for seed in range(70):
        with resting(seed, checks=True) as w:
            holder, address = w.holder(), str(w.vips[0].ip)
            for host in w.hosts:
                host.sick.add(address)
            w.run(15)
            assert w.binders() == [holder] and not w.worst_two, seed
            for host in w.hosts:
                host.sick.clear()
            w.run(10)
            assert w.binders() == [holder] and not w.worst_two and not w.worst_gap, seed


def in_doubt(w: World, host: Host) -> World:
    """One check of this host fails once."""
    for ip in w.config["ips"]:
        ip["healthcheck_interval"] = 30
    w.begin()
    host.sick.add(str(w.vips[0].ip))
    w.run(60, until=lambda: host.managed().probes[0].fails == 1)
    host.sick.clear()
    return w


def test_a_stop_does_not_wait_for_the_next_turn_of_a_check_that_failed_once() -> None:
    for seed in range(6):
        with World(seed, checks=True) as w:
            in_doubt(w, w.hosts[1])
            w.hosts[0].sigterm()
            assert w.run(9, until=lambda w=w: w.hosts[0].agent is None) < 2, seed  # before DOUBTS is over
            w.run(60)
            assert len(w.binders()) == 1 and not w.worst_gap, seed


def test_a_host_that_hangs_in_its_check_gives_a_stopping_one_leave_to_go() -> None:
    with World(1, checks=True, health_check_fall=9) as w:
        in_doubt(w, w.hosts[1])
        w.hosts[1].sick.add(str(w.vips[0].ip))  # no verdict for a long time
        w.hosts[0].sigterm()
        assert w.run(9, until=lambda: w.hosts[0].agent is None) < 3
        assert w.binders() == [w.hosts[1]]


def test_what_one_host_did_not_answer_is_not_the_silence_of_all() -> None:
    for seed in range(10):
        with World(seed, checks=True) as w:
            first, second, _ = w.hosts
            in_doubt(w, second)
            second.sick.add(str(w.vips[0].ip))
            first.ask("failover", str(w.vips[0].ip))
            w.run(1)  # the third is the first standby of a host that has yet to bind it
            w.server.stop()
            w.run(8)
            assert not w.worst_two and not w.worst_gap and len(w.binders()) == 1, seed


def test_of_three_hosts_that_stop_at_nearly_the_same_time_one_keeps_the_vip() -> None:
    for seed in range(24):
        with resting(seed) as w:
            w.run((seed % 20) * 0.05)
            for host in w.rng.sample(w.hosts, 3):
                host.sigterm()
                w.run((0.0, 0.002, 0.02, 0.2)[seed % 4])
            assert w.run(10, until=lambda w=w: not any(host.agent for host in w.hosts)) < 3, seed
            assert len(w.binders()) == 1 and not w.worst_gap, seed


def test_a_host_that_doubts_its_health_takes_the_vip_when_nobody_has_it_any_more_and_not_by_order() -> None:
    for seed in range(10):
        with resting(seed, checks=True, health_check_fall=9) as w:
            first, (second, third), address = w.holder(), w.others(), str(w.vips[0].ip)
            third.kill()
            w.run(6)
            for host in w.hosts:
                host.sick.add(address)
            w.run(2.5)  # failed twice
            second.ask("take_lock", address)
            w.run(0.1)
            assert "ask again when it passes" in w.history[-1], seed
            first.ask("failover", address)
            w.run(0.5)
            assert w.binders() == [first] and w.queue()[0][0] == second.name, seed
            first.power_off()
            assert w.run(5, until=lambda w=w, second=second: second in w.binders()) < 0.35, seed


def test_a_host_that_fails_right_after_it_was_given_the_vip_keeps_what_nobody_else_has() -> None:
    for seed in range(20):
        with resting(seed, checks=True) as w:
            first, (second, third) = w.holder(), w.others()
            w.fault("sick", third, w.vips[0], True)
            w.run(6)
            w.fault("sick", first, w.vips[0], True)
            w.run(6, until=lambda w=w, second=second: second in w.binders())
            w.run(0.03 + 0.001 * seed)  # the first is letting go
            w.fault("sick", second, w.vips[0], True)
            (probe,) = second.managed().probes
            probe.ok, probe.reason = False, "down"
            w.run(10)
            assert len(w.binders()) == 1 and w.worst_gap < 0.3, (seed, w.worst_gap)


@pytest.mark.parametrize("zookeeper", [True, False])
def test_a_stop_on_the_only_host_leaves_the_vip_bound(zookeeper: bool) -> None:
    with resting(6, hosts=1, zookeeper=zookeeper) as w:
        (host,) = w.hosts
        host.sigterm()
        assert w.run(12, until=lambda: host.agent is None) < 10
        w.run(20)
        assert w.binders() == [host]
        w.begin(host)
        assert w.binders() == [host] and "unbinds" not in str(w.history)
        w.settled()
        assert not w.wrong


@pytest.mark.parametrize("zookeeper", [True, False])
def test_a_stop_on_one_of_three_hands_over_without_a_gap(zookeeper: bool) -> None:
    with resting(7, vips=VIPS, zookeeper=zookeeper) as w:
        old, w.gap_limit = w.holder(), 0.0
        old.sigterm()
        w.run(5)
        if zookeeper:
            assert old.agent is None and w.holder() is not old
        w.begin(old)
        w.settled()
        assert not w.wrong


def test_the_binder_is_preferred_after_the_data_of_zookeeper_was_wiped() -> None:
    for seed in range(40):
        with World(seed) as w:
            for host in w.hosts:  # all at once: their places in the queue and their frames cross
                host.start()
            w.run(4)
            holder = w.holder()
            w.server.stop()
            w.run(random.Random(seed).choice((2.0, 10.0)))
            w.server.begin(wiped=True)
            w.run(15)
            assert w.binders() == [holder] and w.queue()[0][0] == holder.name, seed
            w.settled()
            assert not w.wrong, seed


@pytest.mark.parametrize("pause", [0.1, 1.0])
def test_a_crash_and_a_restart_are_seen_by_nobody(pause: float) -> None:
    with resting(8, vips=VIPS, announce_interval=0.0, rest=15) as w:
        before, claims, holder = w.transitions, w.wire.sent[w.holder().name, "claims"], w.holder()
        for _ in range(5):
            holder.kill()
            w.run(pause)
            holder.start()
            w.run(3)
        assert w.transitions == before and w.holder() is holder and not w.worst_gap
        assert w.wire.sent[holder.name, "claims"] == claims


@pytest.mark.parametrize("call", ["take_lock", "failover"])
def test_planned_moves_have_no_gap_and_end_at_once(call: str) -> None:
    with resting(9) as w:
        for _ in range(20):
            old, new = w.holder(), w.others()[0]
            (new if call == "take_lock" else old).ask(call, str(w.vips[0].ip))
            w.run(0.5)
            assert w.binders() == [new] and w.calls[-1][3].done() and w.calls[-1][3].exception() is None
            w.run(1)
        assert w.worst_gap == 0 and w.worst_two < 0.1


@pytest.mark.parametrize("fault", ["freeze", "kill", "cut", "power", "isolate", "starve"])
def test_at_most_one_is_never_two_and_moves_after_the_end_of_the_session(fault: str) -> None:
    for seed in range(20):
        with resting(seed, promise="at-most-one", session_timeout=(2.0, 4.0, 6.0)[seed % 3]) as w:
            w.zookeeper_on_lan = True
            old = w.holder()
            w.fault(fault, old, w.vips[0], True)
            w.run(3)
            w.fault("unbind", old, w.vips[0], True)
            w.run(12)
            assert fault == "starve" or w.holder() is not old, seed
            w.heal()
            w.run(10)
            w.settled()
            assert not w.wrong, (seed, w.wrong)


def test_at_most_one_does_not_bind_on_the_strength_of_an_old_confirmation() -> None:
    for seed, late in itertools.product(range(3), (2.5, 3.0, 3.4, 3.7, 3.9)):
        with resting(seed, promise="at-most-one") as w:
            old = w.holder()
            old.cut = True
            w.run(late)
            w.fault("unbind", old, w.vips[0], True)
            w.run(0.05)
            old.freeze()  # only the kernel can unbind now
            w.run(8)
            assert not w.wrong and w.holder() is not old, (seed, late)


@pytest.mark.parametrize("vips", [1, 50])
@pytest.mark.parametrize("zookeeper", [True, False])
def test_at_rest_the_wire_is_quiet(vips: int, zookeeper: bool) -> None:
    addresses = [f"192.0.2.{n}/32" for n in range(101, 101 + vips)]
    with resting(10, vips=addresses, zookeeper=zookeeper, announce_interval=0.0, rest=20) as w:
        quiet = [h for h in w.hosts if not h.bound]
        holders = len(w.hosts) - len(quiet)
        w.wire.sent.clear()
        w.run(20)
        rates = {h.name: w.wire.sent[h.name, "asks"] / 20 for h in w.hosts}
        assert not any(w.wire.sent[h.name, "claims"] for h in w.hosts)
        assert all(rate <= 25 * max(1, holders) for rate in rates.values()), rates
        if zookeeper and holders == 1:
            assert rates[w.holder().name] == 0 and rates[w.others()[1].name] <= 1.2, rates


# ----------------------------------------------------------------------------
# IPs that come and go, and what ZooKeeper may say
# ----------------------------------------------------------------------------

ADDED = link.ipaddress.ip_interface("192.0.2.150/32")


def add_to(w: World, *hosts: Host) -> None:
    """By the API, one after another."""
    for host in hosts:
        assert host.agent
        host.agent.post(host.agent.add_ip, {"ip": str(ADDED)})
        w.run(0.5)


def names(w: World) -> list[str]:
    return [name for name, _, _ in w.queue(ADDED)]


@pytest.mark.parametrize("outage", [True, False])
def test_a_host_that_an_ip_is_deleted_from_leaves_no_node_that_would_keep_the_others_out(outage: bool) -> None:
    for seed in range(3):
        with resting(seed) as w:
            add_to(w, *w.hosts)
            w.run(2)
            holder, first = w.holder(ADDED), w.host(names(w)[1])
            if outage:
                w.server.stop()
                w.run(1)
            first.ask("delete_ip", str(ADDED.ip))
            w.run(3)
            w.server.begin()
            w.run(8)
            assert first.name not in names(w) and len(names(w)) == 2, seed
            holder.power_off()
            assert w.run(8, until=lambda w=w: bool(w.binders(ADDED))) < 8, seed


def test_a_post_and_a_delete_at_any_distance_leave_no_node_behind() -> None:
    for pause in range(14):
        with resting(1) as w:
            add_to(w, w.hosts[0])
            assert w.hosts[1].agent
            w.hosts[1].agent.post(w.hosts[1].agent.add_ip, {"ip": str(ADDED)})
            w.run(pause / 1000)
            w.hosts[1].ask("delete_ip", str(ADDED.ip))
            w.run(2)
            assert names(w) == [w.hosts[0].name] and w.binders(ADDED) == [w.hosts[0]], pause


@pytest.mark.parametrize("promise", ["at-least-one", "at-most-one"])
@pytest.mark.parametrize("role", ["holder", "first standby"])
def test_an_ip_that_a_reload_takes_out_of_one_host_is_served_by_the_others(role: str, promise: str) -> None:
    with resting(1, promise=promise) as w:
        changed = w.holder() if role == "holder" else w.others()[0]
        ips, w.config["ips"] = w.config["ips"], []
        changed.kill()
        w.run(0.3)
        changed.start()
        w.config["ips"] = ips
        w.run(8)
        assert changed.agent and not changed.agent.vips and changed not in w.binders()
        assert [name for name, _, _ in w.queue()] and changed.name not in [name for name, _, _ in w.queue()]
        assert len(w.binders()) == 1
        assert w.worst_gap == 0 or promise == "at-most-one"
        w.holder().power_off()
        assert w.run(9, until=lambda: bool(w.binders())) < 9


def test_a_node_that_may_not_be_read_has_its_place_in_the_queue_all_the_same() -> None:
    with resting(1) as w:
        get = w.server.get

        def guarded(path: str) -> tuple[bytes, Any]:
            if "/ips/" in path and get(path)[1].ephemeralOwner == 0x999:
                raise kazoo.NoAuthError
            return get(path)

        w.server.get = guarded  # type: ignore[method-assign]
        path = "/link/ips/192.0.2.101/" + "0" * 32 + "__lock__0000000000"
        w.server.nodes[path] = (b"another program", 0x999)
        w.server._changed(("get_children", "/link/ips/192.0.2.101"))
        w.run(3)
        assert all(host.managed().state is not link.State.ACTIVATED or host is w.hosts[0] for host in w.hosts)
        assert len(w.binders()) == 1 and link.Lock.MINE not in [h.agent._lock(h.managed()) for h in w.hosts if h.agent]


BAD_DATA = {
    "a lock node without data": ("/link/ips/192.0.2.101/x__lock__9999999999", None),
    "a host's record with no address in it": ("/link/hosts/zz", b'{"mac": "", "addresses": ["nonsense"], "boot": ""}'),
    "a host's record without end": ("/link/hosts/zz", b"[" * 100000),
    "a host's record with a strange MAC": ("/link/hosts/zz", b'{"mac": "xyz", "addresses": [], "boot": ""}'),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_strange_data_in_zookeeper_stops_no_agent(what: str) -> None:
    path, data = BAD_DATA[what]
    with resting(1) as w:
        holder = w.holder()
        w.server.nodes[path] = (data, 0x999)  # type: ignore[assignment]
        w.server._changed(("get_children", path.rpartition("/")[0]))
        w.run(5)
        assert w.binders() == [holder] and all(host.runs for host in w.hosts)
        holder.kill()
        w.run(0.3)
        holder.start()
        w.run(5)
        assert w.binders() == [holder] and holder.runs


@pytest.mark.parametrize("call", ["create", "ensure_path", "get_children"])
def test_what_zookeeper_refuses_is_asked_again_but_not_in_a_tight_loop(call: str) -> None:
    with World(1, hosts=1) as w:
        right, asked = getattr(w.server, call), list[float]()

        def refuse(path: str, *args: Any, **more: Any) -> Any:
            asked.append(w.now)
            if "/ips" not in path:
                return right(path, *args, **more)
            raise kazoo.NoAuthError

        setattr(w.server, call, refuse)
        w.begin(rest=20)
        assert 5 < len(asked) < 100, len(asked)
        setattr(w.server, call, right)
        w.run(3)
        assert w.queue() and w.binders() == w.hosts
# -- a loop that was late: look first, act after


@pytest.mark.parametrize("asleep", [1.5, 3.5])
def test_a_suspended_holder_that_was_replaced_announces_nothing_when_it_wakes(asleep: float) -> None:
    """By its own clock its session lives, and the queue that it remembers begins with itself."""
    for seed in range(5):
        with resting(seed, rest=1, announce_interval=0.5) as w:
            old = w.holder()
            old.suspend()
            w.run(asleep)
            claims = w.wire.sent[old.name, "claims"]
            old.wake_up()
            assert w.run(3, until=lambda w=w: len(w.binders()) == 1) < 1, seed
            w.run(2)
            assert w.holder() is not old and w.wire.sent[old.name, "claims"] == claims, seed


@pytest.mark.parametrize("witness", [True, False])
def test_a_standby_that_was_stopped_accuses_nobody_on_the_strength_of_what_it_slept_through(witness: bool) -> None:
    """Its last probe was out, the holder is back since, and the witness's old answer waits in the socket."""
    for seed in range(3):
        with World(seed, hosts=3 if witness else 2, announce_interval=0.0) as w:
            w.gateway.powered = witness
            w.begin(rest=11)
            holder, first = w.holder(), w.others()[0]
            holder.side = 1
            w.run(2, until=lambda f=first: f.agent.prober.about_to_claim(f.managed()))
            first.freeze()
            w.run(0.1)
            holder.side = 0
            w.run(2)
            first.resume()
            w.run(5)
            assert "breaks a lock" not in str(w.history) and f"{first.name:9} binds" not in str(w.history), seed


def test_a_binder_that_was_stopped_does_not_yield_to_who_has_died_meanwhile() -> None:
    for seed in range(10):
        with resting(seed, hosts=2, zookeeper=False) as w:
            old = w.holder()
            old.freeze()
            old.side = 1
            w.run(1)
            (new,) = (h for h in w.binders() if h is not old)
            old.side = 0
            w.run(1.5)  # the old one's kernel answers, and the new one defends the address
            new.power_off()
            w.run(1)
            old.resume()
            w.run(5)
            assert w.holder() is old and f"{old.name:9} unbinds" not in str(w.history), seed


# -- who may accuse whom


def test_a_standby_whose_own_cable_is_out_accuses_nobody_although_it_reaches_zookeeper() -> None:
    for seed in range(5):
        with World(seed, hosts=2) as w:
            w.gateway.powered = False  # no witness at all: it cannot be missed
            w.begin()
            holder, first = w.holder(), w.others()[0]
            first.cable(False)
            w.run(20)
            assert w.binders() == [holder] and "breaks a lock" not in str(w.history), seed


def test_the_accused_holder_is_no_witness_that_the_accuser_can_hear() -> None:
    """The standby hears but one word of the whole LAN: the holder's own address. That proves no death."""
    for seed in range(3):
        with resting(seed) as w:
            holder, (first, second) = w.holder(), w.others()
            w.gateway.powered, holder.mute = False, True
            w.wire.broken = {(second.name, first.name)}
            w.run(10)
            assert w.binders() == [holder] and "breaks a lock" not in str(w.history), seed


def test_a_holder_that_goes_on_with_another_mac_is_not_accused() -> None:
    """A bond fails over: its first announcement is a stranger's, its second would come too late."""
    for seed in range(20):
        with resting(seed, rest=2, probe_interval=0.02) as w:
            holder = w.holder()
            w.run(seed * 0.001)
            holder.mac = b"\x02\0\0\0\1\1"
            holder.netlink("has another MAC")
            w.run(2)
            assert w.binders() == [holder] and "breaks a lock" not in str(w.history), seed


def test_only_the_first_standby_accuses() -> None:
    """What stands between the holder and the second standby alone is no death."""
    for seed in range(3):
        with resting(seed) as w:
            holder, second = w.holder(), w.others()[1]
            w.wire.broken = {(holder.name, second.name), (second.name, holder.name)}
            w.run(10)
            assert w.binders() == [holder] and "breaks a lock" not in str(w.history), seed


def test_the_silence_of_the_last_holder_says_nothing_about_its_successor() -> None:
    for seed in range(5):
        with resting(seed) as w:
            old, (new, next_) = w.holder(), w.others()
            w.wire.broken = {(new.name, next_.name)}  # it does not hear the new one, only that the old one is silent
            old.ask("failover", str(w.vips[0].ip))
            w.run(10)
            assert w.binders() == [new] and "breaks a lock" not in str(w.history), seed


# -- moves, and who is told


def test_clients_that_come_back_with_a_contender_are_called() -> None:
    """A move while a part of the LAN was cut off; at most one: nobody there asks the wire, or has bound the address."""
    with resting(1, promise="at-most-one", announce_interval=0.0) as w:
        w.zookeeper_on_lan = True
        away = w.others()[1]
        away.side = 1
        w.run(6)
        w.holder().ask("failover", str(w.vips[0].ip))
        w.run(12)
        new, w.wire.sent = w.holder(), Counter()
        away.side = 0
        w.run(3)
        assert away.name in [name for name, _, _ in w.queue()] and w.wire.sent[new.name, "claims"]


def test_a_process_that_adopts_an_address_looks_before_it_trusts_it() -> None:
    """Another host took over while it was dead and its host isolated: whoever has the lower MAC, it yields at once."""
    for seed in range(10):
        with resting(seed, zookeeper=False, announce_interval=0.5) as w:
            old = w.holder()
            old.kill()
            old.side = 1
            w.run(3)
            claims, old.side = w.wire.sent[old.name, "claims"], 0
            old.start()
            assert w.run(3, until=lambda w=w: len(w.binders()) == 1) < 0.3, seed
            assert w.holder() is not old and w.wire.sent[old.name, "claims"] == claims, seed


def test_an_adopted_address_goes_on_being_announced() -> None:
    with resting(2, announce_interval=5.0) as w:
        holder = w.holder()
        holder.kill()
        holder.start()
        w.run(12)
        w.wire.sent.clear()
        w.run(12)
        assert w.wire.sent[holder.name, "claims"] >= 4


def test_an_address_stays_for_a_moment_when_its_new_holder_is_heard() -> None:
    """Requests are still on their way to the old one."""
    for seed in range(5):
        with resting(seed) as w:
            w.others()[0].ask("take_lock", str(w.vips[0].ip))
            w.run(1, until=lambda w=w: len(w.binders()) == 2)
            assert w.run(1, until=lambda w=w: len(w.binders()) == 1) >= 0.05, seed


def test_a_holder_whose_successor_is_gone_before_it_let_go_calls_its_clients_back() -> None:
    for seed in range(5):
        with resting(seed, hosts=2, rest=15, announce_interval=0.0) as w:
            old, new = w.holder(), w.others()[0]
            new.ask("take_lock", str(w.vips[0].ip))
            w.run(1, until=lambda w=w, old=old: old.managed().unwanted_since < FOREVER)
            new.power_off()
            w.wire.sent.clear()
            w.fault("unlock", new, w.vips[0], True)
            w.run(1)
            assert w.binders() == [old] and f"{old.name:9} unbinds" not in str(w.history), seed
            assert w.wire.sent[old.name, "claims"] >= 4, seed  # at once and again: one may be lost


def test_at_most_one_ends_with_the_last_confirmation_if_the_agent_hangs() -> None:
    """Its lifetimes are not begun anew on the strength of an old one: the kernel must be done when the session is."""
    for seed, late in itertools.product(range(2), (1.5, 2.5, 3.0, 3.4, 3.7, 3.9)):
        with resting(seed, rest=1, promise="at-most-one") as w:
            old = w.holder()
            old.cut = True
            w.run(late)
            old.freeze()
            w.run(5)
            assert not w.wrong and w.holder() is not old, (seed, late)


if __name__ == "__main__":
    logging.basicConfig(format="                    %(message)s", stream=sys.stdout)
    print("\n".join(storm(int(sys.argv[1])).wrong) or "nothing is wrong")
