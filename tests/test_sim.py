"""LinK in a simulated world: virtual time, a simulated LAN and ZooKeeper; the real code of agent, referee and store.

One seed is one schedule: the same seed gives the same faults, the same frames and the same end, whatever the hash seed.

    pytest test_sim.py                  the scenes and stories, and a minute of schedules that nobody has seen before
    python test_sim.py --seed 4711      one schedule, with its timeline
    python test_sim.py --minutes 10     fresh schedules on all processors; --from 0 begins with that seed

What is simulated is what real networks do to LinK: kernels answer for bound addresses also while an agent is stopped,
frames are lost and late, TCP holds what cannot pass and delivers it late, sessions end at ZooKeeper's ticks.

An observer looks after every step. I1: an IP is bound by a host that the clients reach, whenever there is one with a
living agent, but for as long as a session lasts. I2: no two that hear each other have it for longer than they need to
find out (at-most-one: never). I3: three seconds after the end of all faults (and of the sessions that they have left
behind) exactly one has it, with its lock, and the clients know which; a long rest changes nothing
of it. I4: every change has its reason in the history, no order is lost, nothing is left of what has gone.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import heapq
import inspect
import itertools
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
from kazoo import exceptions as kazoo
from kazoo.protocol.serialization import CheckVersion, Delete

sys.path.insert(0, str(Path(__file__).parent.parent))

import link
import mutants
from fakes import AtOnce, FakeNetwork, public, table
from lab import version
from link import Intent, Kind, Lock, State

GATEWAY = "192.0.2.254"
VIPS = ("192.0.2.101/32", "2001:db8::102/128", "192.0.2.103/32")
MEMORY = "/dev/shm"  # state directories lie there, where it is: the disk is not what is tested
FOREVER = float("inf")
VERBOSE = False
BEFORE = "848a503"  # some hosts run this version, from before the redesign's last faults were mended
SHARED = {"LinkError", "State", "Event", "Intent", "Lock", "Look", "Kind", "Link"}  # the words of all versions
READ_FRAME = functools.cache(link.read_frame)
BARE = functools.cache(lambda ip: str(ip.ip))
SAID = {kind: f"{kind.name.lower()}s" for kind in Kind}
INTERFACE = functools.cache(link.ipaddress.ip_interface)
FRAMES = functools.cache(lambda mac, low: REAL_FRAMES(mac, {6: low} if low else {}))
REAL_FRAMES = link.Frames


@functools.cache
def earlier(commit: str) -> ModuleType:
    """That version of the program, with this one's words: the simulation hands them from host to host."""
    tree, module = ast.parse(version(commit)), ModuleType(f"link_{commit}")
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and node.name in SHARED)]
    sys.modules[module.__name__] = module
    vars(module).update({name: getattr(link, name) for name in SHARED}, __file__=link.__file__)
    exec(compile(tree, f"{commit}:link.py", "exec"), vars(module))
    return module


@dataclass(eq=False)
class Host(FakeNetwork):
    """A server: its kernel (link.Network on the simulated wire) and its process (agent, kazoo's threads, memory)."""

    world: World
    name: str
    mac: bytes
    own: dict[int, str]
    powered: bool = True
    carrier: bool = True
    deaf: bool = False  # sends, but receives no frames of interest
    dumb: bool = False  # receives, but nothing that it sends arrives
    muffled: bool = False  # its announcements are dropped by the switch
    unheard: float = -math.inf  # when one was last lost so, or for `dumb`
    began: float = -math.inf  # its agent
    side: int = 0  # of a partition
    cut: bool = False  # from ZooKeeper
    proxy: bool = False  # answers for every address (proxy ARP)
    mute: bool = False  # its answers for virtual addresses are lost
    stopped: bool = False  # SIGSTOP
    starved: float = 0.0  # every turn comes up to so many seconds late
    loses: bool = False  # the answer to its next write to ZooKeeper: the connection breaks when it has taken effect
    settings: dict[str, Any] = field(default_factory=dict)  # of this host alone
    program: Any = link  # or an earlier version
    boot: int = 0
    agent: link.Api | None = None
    bound: dict[link.Address, float] = field(default_factory=dict)  # and until when
    served: set[str] = field(default_factory=set)  # the same, without their prefix lengths
    sick: set[str] = field(default_factory=set)  # health checks fail
    inbox: deque[link.Heard] = field(default_factory=lambda: deque(maxlen=256))
    held: list[Callable[[], None]] = field(default_factory=list)  # what kazoo's threads do once they run again
    news: bool = False  # from the kernel
    expected: float = FOREVER
    wake_at: float = FOREVER
    states: dict[str, State] = field(default_factory=dict)
    cache: dict[str, bytes] = field(default_factory=dict)  # of a client: who has which address, by the announcements
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
        return self.on_wire and not self.deaf and not self.dumb and self.side == 0

    def shares(self, ip: link.Address) -> bool:
        """Whether its agent is to serve this IP, and does its work."""
        managed = self.agent.vips.get(BARE(ip)) if self.agent and self.runs else None
        return managed is not None and managed.intent is not Intent.DELETE

    @property
    def reaches_zookeeper(self) -> bool:
        on_lan = self.world.zookeeper_on_lan and (not self.on_wire or self.side)
        return self.powered and not self.cut and not on_lan

    # -- the kernel

    def sync(self, listen: bool = True) -> tuple[link.Link, dict[link.Address, bool], dict[int, str]]:
        own = {INTERFACE(address): False for address in self.own.values()}
        trouble = "" if self.carrier else "eth0 has no carrier"
        state = link.Link(2, self.mac, self.carrier, self.carrier, trouble)
        return state, {**own, **dict.fromkeys(self.bound, True)}, dict(self.own)

    def add(self, ip: link.Address, lifetime: int = 0) -> None:
        """The kernel looks for expired addresses now and then: up to half a second late."""
        slack, new = self.world.rng.uniform(0, 0.5), ip not in self.bound
        self.bound[ip] = self.world.time + lifetime + slack if lifetime else FOREVER
        if lifetime:
            self.world.at(self.bound[ip], self.expire, ip)
        if new:
            self.served.add(BARE(ip))
            self.netlink("binds", ip)

    def expire(self, ip: link.Address) -> None:
        if self.bound.get(ip, FOREVER) <= self.world.time:
            self.unbind(ip, "the lifetime ends of")

    def remove(self, ip: link.Address) -> None:
        self.unbind(ip)

    def unbind(self, ip: link.Address, how: str = "unbinds") -> None:
        if self.bound.pop(ip, None) is not None:
            self.served.discard(BARE(ip))
            self.netlink(how, ip)

    def clear(self, addresses: Collection[link.Address], lasting: bool = False) -> None:
        for ip in [ip for ip in addresses if lasting and self.bound.get(ip) == FOREVER]:
            self.unbind(ip)

    def ready(self, ip: link.Address) -> bool:
        return ip in self.bound

    def netlink(self, what: str, ip: link.Address | str = "") -> None:
        self.news = True
        self.wake()
        self.world.note(self.name, what, str(ip))

    def changed(self) -> bool:
        seen, self.news = self.news, False
        return seen

    def gateways(self) -> list[str]:
        return [GATEWAY] if self.world.gateway.powered else []

    def send(self, frames: Iterable[bytes]) -> None:
        for frame in frames:
            self.world.wire.send(self, frame)

    def receive(self, limit: int = 512) -> tuple[list[link.Heard], bool]:
        if not self.inbox:
            return [], False
        heard = [self.program.Heard(*self.inbox.popleft()) for _ in range(min(limit, len(self.inbox)))]
        return heard, len(heard) == limit

    def answers(self, address: str) -> bool:
        return (not self.mute and address in self.served) or self.proxy or address in self.own.values()

    def hear(self, heard: link.Heard) -> None:
        if self.agent:
            self.inbox.append(heard)
            self.wake()
        elif heard.kind is Kind.CLAIM and heard.broadcast:
            self.cache[heard.address] = heard.mac

    # -- the process

    def start(self, keep: bool = True) -> None:
        """A new process; without `keep` its state directory was lost."""
        if self.agent or not self.powered:
            return
        world, folder = self.world, self.world.folder / self.own[4]
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        self.stopped, self.wake_at, self.expected, self.kazoo = False, FOREVER, FOREVER, None
        self.inbox.clear(), self.held.clear(), self.states.clear()
        world.active, self.began = self, world.time
        own = {**self.settings, "hostname": self.name, "state_dir": str(folder)}
        program, config = self.program, self.program.make_config({**world.config, **own}, {}, {})
        pool = AtOnce(check=lambda check, _: "HTTP status 503" if check.host in self.sick else "")

        def connect(agent: link.Agent) -> Any:
            if not world.zookeeper:
                return program.NoReferee()
            return program.Referee(config, world.now, agent.loop.post, agent.referee_news)

        self.agent = program.Api(config, self, program.Store(config), connect, clock=world, pool=pool)
        self.upgrade = SimUpgrade(self, self.agent)
        self.agent.start()
        self.wake()
        world.note(self.name, "starts" + " on an island" * bool(self.side))

    def wake(self, when: float = 0.0) -> None:
        """The loop goes round at that time, or now: a little later, as timers and schedulers are."""
        world = self.world
        when = max(when, world.time)
        if when < self.wake_at and self.agent and not self.stopped:
            when += world.rng.random() * (0.0005 + self.starved)
            if when < self.wake_at:
                self.wake_at = when
                heapq.heappush(world.events, (when, next(world.serial), self.turn, (when, self.agent)))

    def turn(self, when: float, agent: link.Agent) -> None:
        if agent is not self.agent or when != self.wake_at or self.stopped:
            return
        self.wake_at, self.world.active = FOREVER, self
        done = agent.turn(self.expected)
        if self.states.keys() - agent.vips.keys():
            self.states = {address: state for address, state in self.states.items() if address in agent.vips}
        for address, managed in agent.vips.items():
            if self.states.get(address) is not managed.state:
                self.world.moved(self, managed, self.states.get(address))
                self.states[address] = managed.state
        if done:
            self.end(agent)
            return
        self.expected = agent.expected
        self.wake(self.expected)

    def later(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        """Something that kazoo's threads do, in this process, if it is there and not stopped."""
        self.world.after(delay, self._run, self.agent, do, args)

    def _run(self, agent: link.Api | None, do: Callable[..., None], args: tuple[Any, ...]) -> None:
        if agent is not self.agent or not agent:
            return
        if self.stopped:
            self.held.append(functools.partial(self._run, agent, do, args))
        else:
            do(*args)

    def end(self, agent: link.Api) -> None:
        """It has stopped, or executes the new program in place of itself: nobody may wait for it any more."""
        self.world.unanswered([call for call in self.world.calls if call[0] is agent])
        if agent.execute:
            agent.save()
            self.kill()
            self.world.after(0.3, self.start)
            self.program = self.world.programs[self.world.programs.index(self.program) - 1]
        self.agent = None
        self.world.note(self.name, "executes itself" if agent.execute else "has stopped")

    def kill(self) -> None:
        if self.kazoo and self.kazoo.line:
            self.kazoo.line.closed = True
        self.world.calls = [call for call in self.world.calls if call[0] is not self.agent]
        self.agent, self.stopped, self.starved = None, False, 0.0

    def reload(self, **settings: Any) -> None:
        """SIGHUP; with these settings from now on."""
        self.settings |= settings
        if self.agent:
            self.agent.loop.post(self.upgrade.ask)

    def sigterm(self) -> None:
        if self.agent:
            self.agent.loop.post(self.agent.stop)

    def freeze(self) -> None:
        self.stopped = self.agent is not None

    def resume(self) -> None:
        if self.stopped:
            self.stopped, self.wake_at = False, FOREVER
            held, self.held = self.held, []
            for do in held:
                self.later(self.world.rng.uniform(0, 0.002), do)
            self.wake()

    def power_off(self) -> None:
        self.kill()
        self.powered, self.boot = False, self.boot + 1
        self.bound.clear(), self.served.clear()

    def power_on(self) -> None:
        if not self.powered:
            self.powered = True
            self.start()

    def cable(self, there: bool) -> None:
        if self.carrier != there:
            self.carrier = there
            self.netlink("has a carrier" if there else "has no carrier")

    def fail_over(self) -> None:
        """The bond goes on with its other card."""
        self.mac = bytes((*self.mac[:4], self.mac[4] ^ 1, self.mac[5]))
        self.netlink("has another MAC")

    def restart(self, pause: float, rest: float = 0.0) -> None:
        """After a crash."""
        self.kill()
        self.world.run(pause)
        self.start()
        self.world.run(rest)

    def ask(self, call: str, what: Any = None) -> None:
        """A request of the HTTP API, for the first VIP or this; one that is not refused is to be answered."""
        if self.agent:
            asked = (self.agent, self.world.time, call, link.Future[Any]())
            self.world.calls.append(asked)
            done = self.agent.loop.ask(getattr(self.agent, call), what or self.world.address)
            done.add_done_callback(lambda done: self._asked(asked, done))

    def _asked(self, asked: tuple[link.Agent, float, str, Any], done: link.Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, link.LinkError):
            self.world.calls.remove(asked)
            self.world.note(self.name, f"{asked[2]}: {error} {error.body.get('detail', '')}")
        elif isinstance(order := done.result(), link.Future):
            order.add_done_callback(lambda done: asked[3].set_exception(done.exception()))
        else:
            asked[3].set_result(None)

    def managed(self) -> link.Vip:
        """As its agent sees the first VIP."""
        return self.agent.find(self.world.address)


class SimUpgrade(link.Upgrade):
    """Proves in half a second what is always right, for all that it sees of the orders under way."""

    def __init__(self, host: Host, agent: link.Api) -> None:
        waits = lambda: [FOREVER for call in host.world.calls if call[0] is agent and not call[3].done()]  # noqa: E731
        super().__init__(agent, [], SimpleNamespace(values=waits))
        self._host = host

    def _files(self) -> list[bytes]:
        return []

    def _prove(self) -> None:
        self._host.later(0.5, lambda: self._agent.loop.post(self._proven, 0, [], self._host.world.time + 3))


class SimDisk:
    """Writes the session at once; a change of the IPs takes its time."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def submit(self, work: Callable[..., Any], *args: Any) -> link.Future[Any]:
        done = link.Future[Any]()
        write = lambda: done.set_result(work(*args))  # noqa: E731
        self._host.later(0.003, write) if args else write()
        return done

    def shutdown(self, **_: Any) -> None:
        """Nothing waits."""


class SimWire:
    """One LAN: frames are lost, late, or do not pass; kernels answer for what is bound."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.loss = 0.0
        self.broken: set[tuple[str, str]] = set()  # (sender, receiver): no frame passes this way
        self.sent: Counter[tuple[str, str]] = Counter()  # (host, asks or claims): frames that agents sent

    def hear_each_other(self, a: Host, b: Host) -> bool:
        told = all(host.on_wire and not (host.dumb or (host.mute and host.muffled)) for host in (a, b))
        able = told and not a.deaf and not b.deaf
        return able and a.side == b.side and not {(a.name, b.name), (b.name, a.name)} & self.broken

    def send(self, sender: Host, frame: bytes) -> None:
        heard, world = READ_FRAME(frame), self._world
        if not sender.on_wire or heard is None:
            return
        self.sent[sender.name, SAID[heard.kind]] += 1
        if heard.kind is Kind.CLAIM and heard.address not in sender.served:
            world.blame(f"{sender.name} announces {heard.address}, which it has not")
        if sender.agent and heard.address in world.addresses and heard.address not in sender.agent.vips:
            world.blame(f"{sender.name} asks for {heard.address}, which it does not share")
        if sender.dumb or (sender.muffled and heard.kind is Kind.CLAIM):
            sender.unheard = world.time
            return
        if sender.side and heard.kind is Kind.CLAIM and world.config.get("promise") == "at-most-one":
            sender.unheard = world.time  # nor will it learn of the heal: it asks nobody
        to = b"" if heard.broadcast else frame[:6]
        for host in world.stations:
            if host is not sender and (not to or host.mac == to):
                self._pass(sender, host, heard)
        for client in world.clients if heard.kind is Kind.CLAIM else ():
            self._pass(sender, client, heard)

    def _pass(self, sender: Host, to: Host, heard: link.Heard) -> None:
        world = self._world
        if not self.loss or world.rng.random() >= self.loss:
            world.after(0.0002 + 0.0018 * world.rng.random(), self._arrive, sender, to, heard)

    def _arrive(self, sender: Host, to: Host, heard: link.Heard) -> None:
        if not to.on_wire or to.deaf or to.side != sender.side or (sender.name, to.name) in self.broken:
            return
        if heard.kind is Kind.ASK and sender.on_wire and not to.dumb and to.answers(heard.address):
            unnamed = ":" in heard.address and 6 not in sender.own  # RFC 4861, 7.2.4: who asks from :: is told by all
            self._pass(to, sender, link.Heard(heard.address, to.mac, Kind.CLAIM, unnamed))
        to.hear(heard)


@dataclass(eq=False)
class Line:
    """A TCP connection to ZooKeeper: keeps the order, holds what cannot pass, delivers it late, or never."""

    host: Host
    session: int = 0
    closed: bool = False  # by the client: what it sent may still arrive
    asked: deque[Callable[[Line], bool]] = field(default_factory=deque)  # the first one waits for a commit
    last: list[float] = field(default_factory=lambda: [0.0, 0.0])
    held: list[tuple[bool, Callable[[], None]]] = field(default_factory=list)

    def carry(self, up: bool, do: Callable[[], None]) -> None:
        world = self.host.world
        most = 0.002 if up else 0.002 + world.server.slow
        self.last[up] = when = max(self.last[up], world.time + (0.0005 + most * world.rng.random()))
        world.at(when, self._arrive, up, do)

    def serve(self) -> None:
        """Answer what was asked, as far as it can be."""
        while self.asked and self.asked[0](self):
            self.asked.popleft()
        if self.asked:
            self.host.world.after(0.02, self.serve)

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
        self.slow = 0.0  # seconds, at most, that each answer takes longer
        self.refuses: Callable[[Host, str, str], Any] = lambda host, call, path: False
        self.leaderless: dict[str, Any] = {}  # hosts whose server has lost its leader: the nodes as it knows them
        self.sessions: dict[int, float] = {}  # and when they end
        self.lines: dict[int, Line] = {}
        self.nodes: dict[str, tuple[bytes, int]] = {}  # path -> data and owner
        self._watches: dict[tuple[str, str], dict[Line, None]] = {}
        self._numbers = itertools.count(1)
        world.after(tick, self._expire)

    def _expire(self) -> None:
        for session, ends in list(self.sessions.items()) if self.up and not self.stalled else ():
            if ends <= self._world.time:
                self._world.note("ZooKeeper", f"session {session} has expired")
                self.end(session)
        self._world.after(self._tick, self._expire)

    def touch(self, session: int) -> None:
        """Sessions end at ticks, never early."""
        self.sessions[session] = math.ceil((self._world.time + self.timeout) / self._tick) * self._tick

    def stop(self) -> None:
        """All servers die: connections are reset."""
        self.up = False
        for line in list(self.lines.values()):
            self._reset(line)

    def begin(self, wiped: bool = False) -> None:
        """Sessions have outlived the outage, and get a fresh timeout; unless the data is gone."""
        if wiped:
            self.sessions, self.nodes, self._watches, self.zxid = {}, {}, {}, 0
        for session in () if self.up and not self.stalled else self.sessions:
            self.touch(session)
        self.up, self.stalled, self.slow = True, False, 0.0

    def part(self, host: Host, leader: bool) -> None:
        """The server of this host has lost its leader, and does not know it yet; or knows: it resets connections."""
        if not leader:
            self.leaderless.setdefault(host.name, dict(self.nodes))
        elif self.leaderless.pop(host.name, None) is not None:
            for line in [line for line in self.lines.values() if line.host is host]:
                self._reset(line)

    def _reset(self, line: Line) -> None:
        del self.lines[line.session]
        if line.host.reaches_zookeeper and line.host.kazoo:
            line.host.later(0.001, line.host.kazoo.disconnected, line)

    def attach(self, line: Line, session: int, zxid: int) -> int:
        """The session, 0 where it has ended, -1 where the client has seen more than this server."""
        if zxid > self.zxid or line.host.name in self.leaderless:  # the leader would have to agree
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
        if (line := self.lines.get(session)) and line.host.name not in self.leaderless:
            self._reset(line)

    def call(self, line: Line, call: str, *args: Any, watch: bool = False, **more: Any) -> Any:
        """Carry out a request: the answer, or the exception that is one."""
        nodes = self.nodes
        try:
            if self.refuses(line.host, call, args[0]):
                raise kazoo.NoAuthError
            self.nodes = self.leaderless.get(line.host.name, nodes)
            answer = getattr(self, call)(*args, **({"owner": line.session} if call == "create" else {}), **more)
        except kazoo.ZookeeperError as error:
            return error
        finally:
            self.nodes = nodes
        if watch:
            self._watches.setdefault((call, args[0]), {})[line] = None
        return answer

    def _changed(self, *keys: tuple[str, str]) -> None:
        self.zxid += 1
        for key in keys:
            for line in self._watches.pop(key, {}):
                if self.lines.get(line.session) is line and line.host.name not in self.leaderless:
                    line.carry(False, functools.partial(line.host.kazoo.fire, key))

    def watched(self, below: str = "") -> int:
        """How many watches living clients have there."""
        there = (lines for (_, path), lines in self._watches.items() if below in path)
        return sum(not line.closed for lines in there for line in lines)

    def put(self, path: str, data: bytes | None, owner: int) -> None:
        """A node that LinK did not create."""
        self.nodes[path] = data, owner
        self._changed(("get_children", path.rpartition("/")[0]))

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
        return [node.rpartition("/")[2] for node in self.nodes if node.rpartition("/")[0] == path]

    def create(
        self, path: str, data: bytes = b"", owner: int = 0, ephemeral: bool = False, sequence: bool = False,
        makepath: bool = False,
    ) -> None:  # fmt: skip
        parent = path.rpartition("/")[0]
        if makepath:
            self.ensure_path(parent)
        elif parent:
            self.get(parent)
        path += f"{next(self._numbers):010d}" * sequence
        if path in self.nodes:
            raise kazoo.NodeExistsError
        self.nodes[path] = data, owner * ephemeral
        self._changed(("get_children", parent))

    def ensure_path(self, path: str) -> None:
        for end in [n for n, letter in enumerate(path + "/") if letter == "/"][1:]:
            if path[:end] not in self.nodes:
                self.create(path[:end])

    def set(self, path: str, data: bytes) -> None:
        self.nodes[path] = data, self.get(path)[1].ephemeralOwner
        self._changed(("get", path))

    def delete(self, path: str) -> None:
        if self.get_children(path):
            raise kazoo.NotEmptyError
        del self.nodes[path]
        self._changed(("get_children", path.rpartition("/")[0]), ("get_children", path), ("get", path))

    def multi(self, check: list[str], delete: list[str]) -> list[Any]:
        if not {*check, *delete} <= set(self.nodes):
            return [kazoo.RolledBackError(), kazoo.NoNodeError()]
        self._world.note("ZooKeeper", f"breaks a lock: {delete[0].split('/')[3]}")
        for path in delete:
            self.delete(path)
        return [True]


class Result:
    """kazoo's IAsyncResult."""

    def rawlink(self, then: Callable[[Any], None]) -> None:
        self.then = then

    def answer(self, answer: Any) -> None:
        self.value, self.exception = (None, answer) if isinstance(answer, Exception) else (answer, None)
        self.then(self)


class SimKazoo:
    """A KazooClient as link.Referee uses it: kazoo's threads, its states, its queue while it is not connected."""

    def __init__(self, host: Host, session: tuple[int, bytes] | None) -> None:
        self._host, self._server, self._rng = host, host.world.server, host.world.rng
        self._session, self.last_zxid = session, 0
        routine = SimpleNamespace(is_alive=lambda: self.client_state != "CLOSED")
        granted = lambda: (self._server.timeout * 2000 / 3, 0)  # noqa: E731
        self._connection = SimpleNamespace(_connect=granted, _read=None, _socket=self, _connection_routine=routine)
        self._say: Callable[[str], None] = lambda state: None
        self._calls: dict[Result, Callable[[Line], Any]] = {}  # what waits for an answer, sent or not
        self._watches: dict[tuple[str, str], dict[Callable[[Any], None], None]] = {}
        self._heard_at = self._completed_at = 0.0
        self.line: Line | None = None
        self.stopped, self.client_state = False, "CONNECTING"

    def shutdown(self, how: int) -> None:
        """The socket is shut down by link: kazoo's thread finds its end."""
        if self.line:
            self._host.later(0.001, self.disconnected, self.line)

    @property
    def client_id(self) -> tuple[int, bytes] | None:
        """The session, while it is connected."""
        return self._session if self.line and self.line.session else None

    @property
    def connected(self) -> bool:
        """For the earlier version."""
        return self.client_id is not None

    def add_listener(self, listener: Callable[[str], None]) -> None:
        self._say = listener

    def start_async(self) -> None:
        self._host.kazoo = self
        self._host.later(0.002, self._connect)
        self._host.later(self._server.timeout / 3, self._beat)

    def stop(self) -> None:
        self.stopped = True
        if line := self.line:
            line.carry(True, lambda: self._server.end(line.session) if line.session in self._server.sessions else None)

    def close(self) -> None:
        """Its descriptors."""

    def die(self) -> None:
        """Its thread ends by an exception: it says that it is closed, and leaves its session alone."""
        if self.line:
            self.line.closed, self.line = True, None
        self.client_state = "CLOSED"
        self._say("LOST")

    def __getattr__(self, name: str) -> Any:
        """All requests: <call>_async."""
        if not name.endswith("_async"):
            raise AttributeError(name)
        return functools.partial(self._ask, name.removesuffix("_async"))

    def transaction(self) -> Any:
        steps: list[CheckVersion | Delete] = []
        paths = lambda kind: [step.path for step in steps if isinstance(step, kind)]  # noqa: E731
        commit = lambda: self._ask("multi", paths(CheckVersion), paths(Delete))  # noqa: E731
        add = lambda kind: lambda path, version=-1: steps.append(kind(path, version))  # noqa: E731
        return SimpleNamespace(operations=steps, commit_async=commit, check=add(CheckVersion), delete=add(Delete))

    def _ask(self, call: str, *args: Any, watch: Callable[[Any], None] | None = None, **more: Any) -> Result:
        result, world = Result(), self._host.world

        def at_client(answer: Any) -> None:
            if self._calls.pop(result, None):
                if watch and not isinstance(answer, Exception):
                    self._watches.setdefault((call, args[0]), {})[watch] = None
                self._heard_at, self.last_zxid = world.time, self._server.zxid
                # Completions are a thread's, watches another's: a watch may be told of before the read that set it.
                late = self._rng.uniform(0, 0.001 + self._host.starved)
                self._completed_at = max(self._completed_at, world.time + late)
                self._host.later(self._completed_at - world.time, result.answer, answer)

        def at_server(line: Line) -> None:
            """ZooKeeper answers one client's requests in their order."""
            line.asked.append(serve)
            if len(line.asked) == 1:
                line.serve()

        def serve(line: Line) -> bool:
            """Whether it is over with this one: not while it waits for a commit."""
            reads = call in ("get", "exists", "get_children")  # and where there is nothing to create:
            reads = reads or (call == "ensure_path" and args[0] in self._server.nodes)
            alone = self._host.name in self._server.leaderless
            if (self._server.stalled or alone) and not reads:
                return False
            if self._server.lines.get(line.session) is line:
                if not alone:
                    self._server.touch(line.session)
                answer = self._server.call(line, call, *args, watch=bool(watch), **more)
                if self._host.loses and not reads and call != "sync":
                    self._host.loses = False
                    self._server._reset(line)
                else:
                    line.carry(False, lambda: at_client(answer))
            return True

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
        self.line, self._heard_at = line, _ = Line(self._host), self._host.world.time
        session = self._session[0] if self._session else 0

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
                self._session, self.client_state = None, "EXPIRED_SESSION"
                self._say("LOST")
            self._host.later(self._rng.uniform(0.1, 0.5) if number else 0.0, self._connect)
            return
        self._heard_at, self._session, self.client_state = self._host.world.time, (number, b"secret"), "CONNECTED"
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
        line, now = self.line, self._host.world.time
        self._host.later(self._server.timeout / 6, self._beat)
        if line and now - self._heard_at > self._server.timeout * 2 / 3:
            self.disconnected(line)
        elif line and line.session:
            line.carry(True, functools.partial(self._beat_at_server, line))

    def _beat_at_server(self, line: Line) -> None:
        if self._server.lines.get(line.session) is line:
            if self._host.name not in self._server.leaderless:
                self._server.touch(line.session)
            line.carry(False, lambda: setattr(self, "_heard_at", self._host.world.time))


class World(link.Clock):
    """Hosts, wire, ZooKeeper and an observer who sees everything, in virtual time."""

    time = 1000.0

    def __init__(
        self, seed: int = 0, hosts: int = 3, vips: int | Iterable[str] = 1, zookeeper: bool = True,
        on_lan: bool = False, witness: bool = True, checks: bool = False, interval: int = 1, tick: float = 0.5,
        **config: Any,
    ) -> None:  # fmt: skip
        self.seed, self.rng = seed, random.Random(seed)
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.serial = itertools.count()
        if isinstance(vips, int):
            vips = [f"192.0.{2 + n // 150}.{101 + n % 150}/32" for n in range(vips)]
        self.vips = [link.ipaddress.ip_interface(vip) for vip in vips]
        self.addresses = {BARE(vip) for vip in self.vips}
        self.address = BARE(self.vips[0])
        self.zookeeper, self.zookeeper_on_lan = zookeeper, on_lan
        self.refresh = config.pop("announce_interval", 60.0) or 1e9
        check = {vip: [{"type": "HTTP", "host": str(vip.ip), "port": 80}] * checks for vip in self.vips}
        self.ips = {v: {"ip": str(v), "checks": check[v], "healthcheck_interval": interval} for v in self.vips}
        self.config = {
            "interface": "eth0",
            "ips": [*self.ips.values()],
            "zookeeper": "zookeeper:2181" if zookeeper else "",
            **config,
        }
        self.server = SimZooKeeper(self, config.get("session_timeout", 4.0), tick)
        self.wire = SimWire(self)
        macs = self.rng.sample(range(1, 250), hosts)
        own = [{4: f"192.0.2.{n}", 6: f"fe80::{n}"} for n in range(hosts + 1)]
        self.hosts = [Host(self, f"h{n}", bytes((2, 0, 0, 0, 0, m)), own[n]) for n, m in enumerate(macs, 1)]
        self.gateway = Host(self, "gateway", b"\x02\0\0\0\0\xfe", {4: GATEWAY}, powered=witness)
        self.stations = [*self.hosts, self.gateway]
        self.clients = [Host(self, "client", b"\x02\0\0\0\0\xfd", {}), Host(self, "islander", b"\x02\0\0\0\0\xfc", {})]
        self.active = self.gateway  # whose code runs
        self.programs: list[Any] = [link]  # a reload executes the next one
        self.roles: dict[str, Host] = {}  # who had the first VIP at first, and who stood by
        self.history: list[str] = []
        self.transitions = 0
        self.calls: list[tuple[link.Agent, float, str, Any]] = []  # orders; those of a killed agent are gone with it
        self.wrong: list[str] = []
        self.gaps: dict[Any, float] = {}  # per VIP: since when nobody serves it although somebody could
        self.twos: dict[Any, float] = {}  # two that hear each other have a VIP: since when
        self.gap_limit = self.two_limit = FOREVER
        self.worst_gap = self.worst_two = 0.0
        self.healed = FOREVER  # when all faults were last ended
        self._patches = ExitStack()

    def __enter__(self) -> World:
        put = self._patches.enter_context
        self.folder = Path(put(tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)))
        frames = lambda mac, own: FRAMES(mac, own.get(6))  # noqa: E731
        client = lambda config, session, *_: SimKazoo(self.active, session)  # noqa: E731
        boot = lambda: f"{self.active.name}-{self.active.boot}"  # noqa: E731
        thread = lambda target, **_: SimpleNamespace(start=target, join=lambda wait: None)  # noqa: E731
        timer = lambda delay, do, args: SimpleNamespace(start=lambda: self.active.later(delay, do, *args))  # noqa: E731
        mocks = {"Frames": frames, "_kazoo_client": client, "random": self.rng, "boot_id": boot}
        mocks |= {"REFRESH": self.refresh, "ThreadPoolExecutor": lambda *_: SimDisk(self.active)}
        mocks |= {"threading": SimpleNamespace(Thread=thread, Timer=timer)}
        for program in self.programs:
            put(mock.patch.multiple(program, **mocks))
        event = {"eventfd": lambda *_: self.stations.index(self.active), "eventfd_read": lambda _: 0}
        event["eventfd_write"] = lambda number, _: self.stations[number].wake()
        put(mock.patch.multiple(os, fsync=lambda _: None, fdatasync=lambda _: None, **event))
        self._patches.callback(link.log.setLevel, link.log.level)  # not by a patch: loggers remember what is enabled
        link.log.setLevel(logging.INFO if VERBOSE else logging.CRITICAL)
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        self._patches.close()
        if error:
            error.add_note(f"seed {self.seed}")

    # -- time

    def now(self) -> float:
        return self.time

    def stamp(self, ago: float = 0.0, digits: str = "seconds") -> str:
        return datetime.fromtimestamp(self.time - ago, UTC).isoformat(timespec=digits).replace("+00:00", "Z")

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self.serial), do, args))

    def after(self, delay: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (self.time + delay, next(self.serial), do, args))

    def run(self, seconds: float, until: Callable[[], Any] | None = None) -> float:
        """Go on so long, or until something is true; the seconds that took."""
        events, began = self.events, self.time
        end = began + seconds
        while events[0][0] <= end:
            if until and until():
                return self.time - began
            self.time, _, do, args = heapq.heappop(events)
            do(*args)
        if until and until():
            return self.time - began
        self.time = end
        return FOREVER

    def begin_count(self) -> None:
        self.wire.sent.clear()
        self.worst_gap, self.worst_two, self.counted_at = 0.0, 0.0, self.transitions
        self.counted_from = len(self.history)

    # -- what the observer sees

    def note(self, who: str, what: str, more: str = "") -> None:
        line = f"{self.time - 1000:9.4f} {who:9} {what} {more}"
        self.history.append(line)
        if VERBOSE:
            print(line)
        self.look()

    def blame(self, what: str) -> None:
        self.wrong.append(f"{self.time - 1000:.3f} {what}")

    def count(self, text: str) -> int:
        """How often that is in the history."""
        return str(self.history).count(text)

    def moved(self, host: Host, managed: link.Vip, old: State | None) -> None:
        self.note(host.name, f"{managed.vip.ip} is {managed.state.value}", managed.reason)
        self.transitions += old is not None
        told = managed.story.history[-1] if old else {"to": managed.state.value, "reason": managed.reason}
        if told["to"] != managed.state.value or not told["reason"]:
            self.blame(f"{host.name} is {managed.state.value}, and tells {told}")

    def unanswered(self, calls: Iterable[tuple[link.Agent, float, str, Any]]) -> None:
        for _, when, call, future in calls:
            if not future.done():
                self.blame(f"{call} at {when - 1000:.3f} was never answered")

    def binders(self, vip: link.Address | None = None) -> list[Host]:
        return [host for host in self.hosts if (vip or self.vips[0]) in host.bound]

    def holder(self, vip: link.Address | None = None) -> Host:
        (host,) = self.binders(vip)
        return host

    def others(self) -> list[Host]:
        """The standbys, in the order of the queue."""
        queue = self.names()
        order = sorted(self.hosts, key=lambda h: queue.index(h.name) if h.name in queue else 99)
        return [host for host in order if host is not self.holder()]

    def queue(self, vip: link.Address | None = None) -> list[tuple[str, int, str]]:
        """The contenders' names, sessions and nodes, as ZooKeeper has them."""
        root, nodes = f"/link/ips/{(vip or self.vips[0]).ip}/", self.server.nodes
        paths = sorted((path for path in nodes if path.startswith(root)), key=lambda path: path[-10:])
        return [(nodes[path][0].decode(), nodes[path][1], path) for path in paths]

    def names(self, vip: link.Address | None = None) -> list[str]:
        return [name for name, _, _ in self.queue(vip)]

    def claims(self, host: Host) -> int:
        """The announcements that it has sent."""
        return self.wire.sent[host.name, "claims"]

    def excused(self) -> bool:
        """Whether who has the lock may serve an island; at most one: whether ZooKeeper is anything but well."""
        if self.config.get("promise") == "at-most-one":
            server = self.server
            ill = not server.up or server.stalled or server.slow or server.leaderless
            return bool(ill) or any(h.cut or (h.agent and not h.serves) for h in self.hosts)
        return self.zookeeper and any(h.on_wire and not h.serves and h.reaches_zookeeper for h in self.hosts)

    def look(self) -> None:
        """Time the gaps and the doubles; called whenever something may have changed."""
        excused, strict = self.excused(), self.config.get("promise") == "at-most-one"
        for vip in self.vips:
            binders = self.binders(vip)
            fit = [host for host in self.hosts if host.serves and host.shares(vip) and not (strict and host.sick)]
            able = fit and not excused
            self._time(self.gaps, (vip,), able and not any(h.serves for h in binders))
            for a, b in itertools.combinations(self.hosts, 2):
                two = a in binders and b in binders and a.runs and b.runs
                self._time(self.twos, (vip, a.name, b.name), two and self.wire.hear_each_other(a, b))
            if strict and len(binders) > 1:
                self.blame(f"{vip}: {len(binders)} hosts have it")

    def _time(self, table: dict[Any, float], key: tuple[Any, ...], wrong: bool) -> None:
        if wrong:
            table.setdefault(key, self.time)
        elif key in table:
            self._judge(table, key)

    def _judge(self, table: dict[Any, float], *keys: Any) -> None:
        for key in keys or list(table):
            took, where = self.time - table.pop(key), " ".join(map(str, key))
            if table is self.gaps:
                self.worst_gap, limit, what = max(self.worst_gap, took), self.gap_limit, "nobody has it"
            else:
                self.worst_two, limit, what = max(self.worst_two, took), self.two_limit, "two have it"
            if took > limit:
                self.blame(f"{where}: {what} for {took:.3f} s (limit {limit})")

    def disturb(self) -> None:
        """Something new has happened: the patience with a gap begins anew; what was wrong before is judged."""
        self._judge(self.gaps)
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

    def fault(self, kind: str, host: Host, vip: link.Address | None = None, on: bool = True) -> None:
        """Begin or end a fault. Each end may come twice, and after others."""
        self.note("fault", kind if on else f"end of {kind}", host.name)
        vip = vip or self.vips[0]
        address, nothing = str(vip.ip), lambda: None

        def put(name: str, value: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
            return lambda: setattr(host, name, value), lambda: setattr(host, name, type(value)())

        def sick(*hosts: Host) -> tuple[Callable[[], Any], Callable[[], Any]]:
            return lambda: [h.sick.add(address) for h in hosts], lambda: [h.sick.discard(address) for h in hosts]

        def path(*ways: tuple[Host, Host]) -> tuple[Callable[[], Any], Callable[[], Any]]:
            pairs = {(a.name, b.name) for a, b in ways}
            return lambda: self.wire.broken.update(pairs), lambda: self.wire.broken.difference_update(pairs)

        def server(name: str, value: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
            return lambda: setattr(self.server, name, value), self.server.begin

        other = self.hosts[self.stations.index(host) - 1]
        acts: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            # the host
            "power": (host.power_off, host.power_on),
            "kill": (host.kill, host.start), "forget": (host.kill, lambda: host.start(keep=False)),
            "sigterm": (host.sigterm, lambda: (host.kill(), host.start())),
            "reload": (host.reload, nothing),
            "other settings": (lambda: host.reload(probe_interval=0.1, probe_count=5), host.settings.clear),
            "freeze": (host.freeze, host.resume), "starve": put("starved", 0.4), "delay": put("starved", 0.02),
            "unbind": (lambda: host.unbind(vip, "an operator unbinds"), nothing),
            "sick": sick(host), "all sick": sick(*self.hosts),
            # its link
            "cable": (lambda: host.cable(False), lambda: host.cable(True)),
            "bond": (host.fail_over, nothing),
            "isolate": put("side", 1), "deaf": put("deaf", True), "dumb": put("dumb", True), "mute": put("mute", True),
            "muffle": put("muffled", True),
            "proxy": (lambda: setattr(self.gateway, "proxy", True), lambda: setattr(self.gateway, "proxy", False)),
            "half path": path((host, other)), "no path": path((host, other), (other, host)),
            # ZooKeeper
            "zookeeper": (self.server.stop, self.server.begin), "stall": server("stalled", True),
            "slow": server("slow", 0.25), "very slow": server("slow", 1.0),
            "cut": put("cut", True), "lose": put("loses", True),
            "leaderless": (lambda: self.server.part(host, False), lambda: self.server.part(host, True)),
            "unlock": (lambda: [self.server.delete(path) for _, _, path in self.queue(vip)[:1]], nothing),
            # the API
            "lock": (lambda: host.ask("take_lock", address), nothing),
            "failover": (lambda: [h.ask("failover", address) for h in self.binders(vip)], nothing),
            "delete": (lambda: host.ask("delete_ip", address), lambda: host.ask("add_ip", self.ips[vip])),
        }  # fmt: skip
        acts[kind][not on]()
        self.clients[1].side = int(any(host.side for host in self.hosts))
        self.disturb()

    def heal(self) -> None:
        """All faults end."""
        self.wire.loss, self.gateway.proxy = 0.0, False
        self.wire.broken.clear()
        self.server.begin()
        for host in self.hosts:
            host.side, host.starved = 0, 0.0
            host.deaf = host.dumb = host.muffled = host.mute = host.cut = host.loses = False
            self.server.part(host, leader=True)
            host.sick.clear()
            host.resume()
            host.power_on()
            host.cable(True)
            if host.agent and host.agent.stopping is not None:
                host.kill()
            host.start()
        self.clients[1].side, self.healed = 0, self.time
        self.note("fault", "all healed")
        self.disturb()

    def settled(self, quiet: float = 10.0) -> None:
        """Exactly one host has each address, owns its lock, and is known to the clients; and nothing moves any more."""
        self._judge(self.gaps)
        self._judge(self.twos)
        self.look()
        before, strict = (len(self.history), self.transitions), self.config.get("promise") == "at-most-one"
        # Who began anew on an island, or never asks the wire, joins nothing after it: its clients wait for a minute.
        alone = strict or self.count("end of forget") or self.count("starts on an island")
        for _ in range(2):
            long = self.time - self.healed > 1.1 * link.REFRESH  # each has announced its IPs since, to everybody
            told_of = self.clients[: 1 if alone and not long else 2]
            for vip in self.vips:
                binders, queue = self.binders(vip), [(name, session) for name, session, _ in self.queue(vip)]
                names, sharers = [host.name for host in binders], [host for host in self.hosts if host.shares(vip)]
                owner = [(h.name, h.kazoo.client_id[0]) for h in binders if h.kazoo and h.kazoo.client_id]
                wrong = (self.zookeeper and queue[:1] != owner) or {*binders} - {*sharers} or len({*queue}) < len(queue)
                if len(names) != bool(sharers) or wrong:
                    self.blame(f"{vip}: bound on {names}, queue {queue}")
                for host in sharers if self.zookeeper else ():
                    known = host.program.show(host.agent.vips[BARE(vip)], host.agent.loop.now)["hosts"]
                    if known != [name for name, _ in queue]:
                        self.blame(f"{vip}: queue {queue}, known to {host.name} as {known}")
                states = {h.name: h.states.get(BARE(vip)) for h in sharers}
                if [n for n, s in states.items() if s is State.ACTIVATED] != names:
                    self.blame(f"{vip}: bound on {names}, states {states}")
                macs = {client.name: client.cache.get(BARE(vip)) for client in told_of}
                told = binders and (long or len(sharers) == len(self.hosts))  # who has forgotten it can tell nobody
                told = told and self.time - binders[0].unheard > 1.1 * link.REFRESH  # else it will say so again
                told = told and self.time - binders[0].began > 7  # its first word may have been lost
                if told and not {*macs.values()} <= {binders[0].mac, binders[0].mac if long else None}:
                    self.blame(f"{vip}: bound on {names}, clients know {macs}")
            self.run(quiet)
        if (len(self.history), self.transitions) != before:
            self.wrong.append("no rest: " + " | ".join(self.history[before[0] :][:6]))
        self.unanswered(self.calls)

    def rest(self, seconds: float) -> None:
        """So long all is well: no node changes, nobody has trouble or works much, holders announce once a minute."""
        before = [(host, host.agent, host.agent.loop.turns, self.claims(host)) for host in self.hosts if host.agent]
        zxid, said = self.server.zxid, {4: 2, 6: 1}  # frames in an announcement
        self.settled(quiet=seconds / 2)
        for host, agent, turned, claimed in before:
            turns, claims = agent.loop.turns - turned, self.claims(host) - claimed
            frames, times = sum(said[ip.version] for ip in host.bound), seconds / link.REFRESH
            if not frames * int(times / 1.1) <= claims <= frames * (times / 0.9 + 3):
                self.blame(f"{host.name} has announced {len(host.bound)} IPs by {claims} frames in {seconds:.0f} s")
            # an earlier version asks each minute alone who has never answered, and says so meanwhile
            trouble = agent.health()["trouble"] if host.program is link else []
            if turns > 100 * seconds or host.agent is not agent or trouble:
                self.blame(f"no rest for {host.name}: {turns} turns in {seconds:.0f} s, {trouble}")
        if self.server.zxid != zxid:
            self.blame(f"no rest for ZooKeeper: {self.server.zxid - zxid} changes in {seconds:.0f} s")

    def remains(self) -> bool:
        """Whether ZooKeeper has sessions of processes that are over: their nodes stand in the queues till they end."""
        alive = {h.kazoo.client_id[0] for h in self.hosts if h.agent and h.kazoo and h.kazoo.client_id}
        return not self.server.sessions.keys() <= alive

    def end(self) -> None:
        """All IPs are taken away, by the API and by reloads: nothing is left of them anywhere."""
        self.config["ips"] = []
        for host in self.hosts:
            for vip in self.vips:
                host.ask("delete_ip", BARE(vip))
            host.reload()
        self.run(8)
        left = [path for path in self.server.nodes if "__lock__" in path]  # an empty directory may stay
        left += [f"{host.name} has {BARE(ip)}" for host in self.hosts for ip in host.bound]
        left += [f"{host.name} knows {[*host.agent.vips]}" for host in self.hosts if host.agent and host.agent.vips]
        if left or self.server.watched("/ips/"):
            self.blame(f"left: {left}, {self.server.watched('/ips/')} watches")
        self.unanswered(self.calls)

    def host(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)


# == Storms: seeded schedules of faults ========================================

KINDS = (  # what World.fault() does; the last two where there are checks
    "power", "kill", "forget", "sigterm", "reload", "other settings", "freeze", "starve", "delay", "unbind", "cable",
    "bond", "isolate", "deaf", "dumb", "mute", "muffle", "half path", "no path", "lock", "failover", "delete", "sick",
    "all sick",
)  # fmt: skip
REST = (0.0, 0.0, 15.0, 45.0, 150.0)  # seconds between squalls: the longest timer (REFRESH) runs down three times
ZOOKEEPER_KINDS = ("proxy", "zookeeper", "stall", "slow", "very slow", "cut", "lose", "leaderless", "unlock")


def storm(seed: int, versions: bool = True) -> World:
    """One run: a random configuration, rounds of random faults and peace; what is wrong is in `wrong`.

    In every fourth one each host runs this version or an earlier one, and a reload executes the other.
    """
    rng, calm, mix = random.Random(seed), random.Random(f"rest {seed}"), random.Random(f"versions {seed}")
    zookeeper = rng.random() < 0.65
    strict = zookeeper and rng.random() < 0.25
    timeout, tick = (rng.choice((2.0, 4.0, 6.0)), rng.choice((0.1, 0.5, 2.0))) if zookeeper else (0.0, 0.1)
    config = {"session_timeout": timeout, "promise": "at-most-one"} if strict else {"session_timeout": timeout or 4.0}
    sick = rng.random() < 0.3
    world = World(seed, vips=VIPS[: rng.randint(1, 3)], zookeeper=zookeeper, checks=sick, tick=tick, **config)
    if versions and mix.random() < 0.25:
        world.programs.append(earlier(BEFORE))
        for host in world.hosts:
            host.program = mix.choice(world.programs)
    with world:
        world.zookeeper_on_lan = rng.random() < 0.5
        world.gateway.powered = rng.random() < 0.7
        added = world.vips[-1:] if rng.random() < 0.3 else []
        world.config["ips"] = [world.ips[vip] for vip in world.vips if vip not in added]
        together = rng.choice((0.0, 0.001, 1.0))
        for host in world.hosts:
            world.after(rng.uniform(0, together), host.start)
        for host, vip in itertools.product(world.hosts, added):
            world.after(together, host.ask, "add_ip", world.ips[vip])
        world.run(timeout + tick + 2)
        # Binders without a confirmed lock look for a rival on one VIP each 0.8 s; one that is found leads to all.
        world.two_limit = FOREVER if strict else 0.8 * (1 + len(world.vips))
        world.gap_limit = timeout + tick + 1.5
        for _ in range(rng.choice((1, 1, 2, 3))):
            squall(world, rng, sick, strict)
            world.run(timeout + tick, until=lambda: not world.remains())
            world.run(3)
            world.settled(quiet=5.0)
            if rest := calm.choice(REST) * calm.uniform(0.5, 1.5):
                world.rest(rest)
        world.end()
    return world


def squall(world: World, rng: random.Random, sick: bool, strict: bool, seconds: float = 12.0) -> None:
    """Some faults, one after the other and at the same time, then the end of all."""
    kinds = [*KINDS[: None if sick else -2], *(ZOOKEEPER_KINDS if world.zookeeper else ())]
    kinds = [kind for kind in kinds if not (strict and kind == "unlock")]
    world.wire.loss = rng.choice((0.0, 0.0, 0.01))
    for _ in range(rng.randint(1, 7)):
        kind, host, vip = rng.choice(kinds), rng.choice(world.hosts), rng.choice(world.vips)
        begin = world.time + rng.uniform(0, seconds)
        last = rng.choice((0.05, 0.3, 1.5, 4.0, 9.0)) * rng.uniform(0.5, 1.5)
        world.at(begin, world.fault, kind, host, vip)
        world.at(begin + last, world.fault, kind, host, vip, False)
    world.run(rng.choice((1, 2)) * (seconds + 1))
    world.events = [event for event in world.events if event[2] != world.fault]
    heapq.heapify(world.events)
    world.heal()


class Hunt(NamedTuple):
    schedules: int
    seconds: float  # simulated
    failed: dict[int, list[str]]


def hunt(first: int, step: int, seconds: float) -> Hunt:
    """So many seconds of schedules: every so manieth seed from the first one on."""
    ends, simulated, failed = time.monotonic() + seconds, 0.0, dict[int, list[str]]()
    for seed in itertools.count(first, step):
        if time.monotonic() >= ends:
            return Hunt((seed - first) // step, simulated, failed)
        world = storm(seed)
        simulated += world.time - World.time
        if world.wrong:
            failed[seed] = world.wrong[:3]
            print(f"--seed {seed}: {failed[seed]}", flush=True)
    raise AssertionError


def weigh(agent: link.Api) -> int:
    """How many objects an agent holds, its client of ZooKeeper included; what is not its own does not count."""
    foreign = (World, Host, SimZooKeeper, type, ModuleType, FunctionType)
    known, left = {id(agent)}, [agent]
    while left:
        for each in gc.get_referents(left.pop()):
            if id(each) not in known and not isinstance(each, foreign):
                known.add(id(each))
                left.append(each)
    return len(known)


@pytest.mark.parametrize("promise", ["at-most-one", "at-least-one", ""])
def test_hundreds_of_faults_leave_one_holder_and_no_timer_waiter_or_watch_behind(promise):
    """Without a promise there is no ZooKeeper."""
    rng, weights, config = random.Random(1), list[list[int]](), {"promise": promise} if promise else {}
    with World(1, vips=VIPS, zookeeper=bool(promise), checks=True, session_timeout=2.0, **config) as w:
        w.begin()
        while len(weights) < 4:
            for _ in range(25):
                squall(w, rng, sick=True, strict=promise == "at-most-one", seconds=4)
                w.run(1)
            w.run(6)
            w.settled(quiet=4)
            weights.append([max(weigh(h.agent) for h in w.hosts), 1 + len(w.server.sessions), 1 + w.server.watched()])
    grown = [last / first for first, last in zip(weights[0], weights[-1], strict=True)]
    assert not w.wrong and max(grown) < 1.5, (w.wrong[:3], weights)


# == Scenarios: each fails where its rule is taken out of link.py ==============

ROLES = ("holder", "first", "second")  # the standbys as they are in the queue
WORLD = ("hosts", "vips", "zookeeper", "witness", "promise", "session_timeout", "announce_interval")
STRICT: dict[str, Any] = {"promise": "at-most-one"}


def story(seeds: int | Iterable[int] = 1, rest: float | None = 4.0, **config: Any) -> Any:
    """A test that is told once per seed in a world at rest (None: where nothing has begun), and names whom it needs.

    Nothing is wrong at the end. What is parametrized goes before what is said here.
    """

    def decorate(tell: Callable[..., None]) -> Callable[..., None]:
        names = list(inspect.signature(tell).parameters)

        @functools.wraps(tell)
        def test(**values: Any) -> None:
            given = {"rest": rest, "seeds": seeds, **values}
            for seed in range(given["seeds"]) if isinstance(given["seeds"], int) else given["seeds"]:
                with World(seed, **{**config, **{name: values[name] for name in WORLD if name in values}}) as w:
                    given.update(w=w, seed=seed)
                    if given["rest"]:
                        w.begin(rest=given["rest"])
                        w.roles = dict(zip(ROLES, [w.holder(), *w.others()], strict=False))
                        given.update(w.roles)
                    tell(**{name: given[name] for name in names})
                    assert not w.wrong, w.wrong

        left = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names if n not in ("w", "seed", *ROLES)]
        test.__signature__ = inspect.Signature(left)  # type: ignore[attr-defined]
        return test

    return decorate


def test_the_simulated_ports_have_the_signatures_of_the_real_ones():
    for ours, real in ((Host, link.Network), (FakeNetwork, link.Network), (World, link.Clock)):
        assert public(real).items() <= public(ours).items()


def test_the_same_seed_is_the_same_run_whatever_the_hash_seed():
    program = "import test_sim; w = test_sim.storm(8); print(w.history, sorted(w.wire.sent.items()))"
    paths = os.pathsep.join(os.path.dirname(os.path.abspath(file)) for file in (__file__, link.__file__))
    command = [sys.executable, "-c", program.replace("test_sim", __name__)]
    env = {**os.environ, "PYTHONPATH": paths}
    runs = [subprocess.check_output(command, env={**env, "PYTHONHASHSEED": seed}) for seed in "12"]
    assert runs[0] == runs[1]


# -- scenes: an act is seconds that pass, what somebody does or suffers, or what must be so (maybe within some seconds)

DOES: dict[str, Callable[[World, Any], Any]] = {  # besides all faults, their ends, and what follows here
    "takes it": lambda w, h: h.ask("take_lock"), "gives it": lambda w, h: h.ask("failover"),
    "starts": lambda w, h: h.start(), "restarts": lambda w, h: h.restart(0.3), "heals": lambda w, _: w.heal(),
    "dies": lambda w, _: w.server.stop(), "lives": lambda w, _: w.server.begin(), "settles": lambda w, _: w.settled(),
    "commits nothing": lambda w, _: setattr(w.server, "stalled", True),
    "commits again": lambda w, _: setattr(w.server, "stalled", False),
    "has a server without a leader": lambda w, h: w.server.part(h, False),  # that answers reads and pings
    "has another MAC": lambda w, h: (setattr(h, "mac", b"\x02\0\0\0\1\1"), h.netlink("has another MAC")),
    "is down": lambda w, h: vars(h.managed().checks._probes[0]).update(ok=False, reason="down"),
    "loses its link-local address": lambda w, h: (h.own.pop(6), h.netlink("loses its link-local address")),
    "begins": lambda w, _: w.begin_count(), "on an island": lambda w, h: setattr(h, "side", w.hosts.index(h) + 1),
    **{f"unheard by {role}": lambda w, h, role=role: w.wire.broken.add((h.name, w.roles[role].name)) for role in ROLES},
}  # fmt: skip
IS: dict[str, Callable[[World, Any], Any]] = {
    "has it": lambda w, h: h in w.binders(), "lacks it": lambda w, h: h not in w.binders(),
    "alone has it": lambda w, h: w.binders() == [h],
    "lost it": lambda w, h: len(w.binders()) == 1 and w.binders() != [h],
    "is replaced": lambda w, h: all(any(b is not h for b in w.binders(vip)) for vip in w.vips),
    "has one successor": lambda w, h: len([b for b in w.binders() if b is not h]) == 1,
    "has stopped": lambda w, h: h.agent is None, "is failing": lambda w, h: h.managed().state is State.FAILING,
    "has heard it": lambda w, h: h.managed().reason == "another host has the lock and the IP",
    "tells that it began anew": lambda w, h: "began anew; " in h.managed().story.history[-1]["reason"],
    "finds its holder mute": lambda w, h: "does not answer" in h.managed().reason and (
        link.show(h.managed(), h.agent.loop.now)["wire"]["state"] == "silent"),
    "may accuse": lambda w, h: h.agent.health()["quick"],
    "hears nobody": lambda w, h: "hears nobody" in h.managed().reason,
    "has no place": lambda w, h: h.name not in w.names(), "has a place": lambda w, h: h.name in w.names(),
    "leads": lambda w, h: w.names()[0] == h.name, "waits alone": lambda w, h: w.names() == [h.name],
    "claims next": lambda w, h: h.agent.wire._about_to_claim(h.agent.wire._ears[w.address]),
    "is leaving": lambda w, h: h.managed().at.leaving is not None,
    "has failed once": lambda w, h: h.managed().checks._probes[0].row == -1,
    "is told to ask again": lambda w, _: "ask again when it passes" in w.history[-1],
    "is told that nobody can": lambda w, _: "nobody can take it" in w.history[-1],
    "stands by": lambda w, h: h.managed().state is State.STANDBY,
    "asked eight times": lambda w, h: 7 <= w.wire.sent[h.name, "asks"] <= 9,
    "announced nothing": lambda w, h: not w.claims(h), "announced it": lambda w, h: w.claims(h),
    "announced it four times": lambda w, h: w.claims(h) >= 4,
    "never unbound": lambda w, h: not w.count(f"{h.name:9} unbinds"),
    "single": lambda w, _: all(len(w.binders(vip)) == 1 for vip in w.vips),
    "somewhere": lambda w, _: w.binders(), "nowhere": lambda w, _: not w.binders(),
    "quiet": lambda w, _: len(w.history) == w.counted_from,
    "twice": lambda w, _: len(w.binders()) == 2, "unmoved": lambda w, _: w.transitions == w.counted_at,
    "stays": lambda w, _: w.binders() == [w.roles["holder"]] and w.count(" binds ") == len(w.vips) and not (
        w.count("breaks a lock")),
    "not by accusation": lambda w, _: not w.count("breaks a lock"), "no gap": lambda w, _: not w.worst_gap,
    "never twice": lambda w, _: not w.worst_two, "hardly twice": lambda w, _: w.worst_two < 0.1,
    "briefly twice": lambda w, _: w.worst_two < 1, "hardly a gap": lambda w, _: w.worst_gap < 0.3,
}  # fmt: skip


def play(w: World, script: str) -> None:
    """Act by act. `phase`: so many seconds times the seed; who is no host is named for the reader."""
    for act in script.split(", "):
        name, _, rest = act.partition(" ")
        what, _, limit = rest.partition(" within ")
        if name[0].isdigit() or name == "phase":
            w.run(float(rest) * w.seed if rest else float(name))
        for one in {"all": w.hosts, "gateway": [w.gateway]}.get(name, [w.roles.get(name)]) if rest else ():
            if what in DOES:
                DOES[what](w, one)
            elif what in IS:
                so = functools.partial(IS[what], w, one)
                assert w.run(99, until=so) < float(limit) if limit else so(), act
            elif name != "phase":
                w.fault(what.removeprefix("ends "), one, on=not what.startswith("ends "))


DOUBT = "first sick, first has failed once within 60, first ends sick"
SCENES: list[tuple[str, int | list[int], dict[str, Any], str]] = [  # name, seeds, world, script
    *(("with ZooKeeper a dead holder is replaced within 350 ms", 10, {"on_lan": True},
       f"holder {fault}, holder is replaced within 0.35, 10, holder ends {fault}, vip single within 1, 10, vip settles")
      for fault in ("power", "cable", "isolate")),
    # at rest it is asked every 0.125 s; from the first miss on 0.1 s are waited for ZooKeeper, whose leader is gone
    ("a holder that takes its ZooKeeper along is replaced as soon", 20, {},
     "phase 0.007, first cut, second cut, holder power, holder is replaced within 0.26"),
    # it asks everybody, too, and has the lower MAC: without a lock it would go first
    ("the second standby's questions do not hold up the first one while ZooKeeper commits nothing",
     [*range(60, 64), *range(132, 142)], {},
     "phase 0.0137, zookeeper commits nothing, holder power, holder is replaced within 0.28"),
    # without a gateway it is the last witness, and dead: its silence is not deafness
    ("a host that died before is no witness when the holder dies", 5, {"vips": 40},
     "gateway power, second power, 8, holder power, first has it within 0.35"),
    # delay: the loop learns in the same turn that the connection was lost and is there again
    ("a dead holder is replaced as soon while ZooKeeper commits nothing", 50, {},
     "phase 0.007, zookeeper commits nothing, first delay, second delay, holder power, holder is replaced within 0.33,"
     " 0.5, zookeeper commits again, world heals, 8, vip settles, vip never twice"),
    ("a first standby that has just begun replaces a dead holder of many IPs as soon", 8, {"vips": 10},
     "first restarts, 1, holder power, holder is replaced within 0.35"),
    *(("proxy ARP neither hides a death nor fakes a holder", 3, {},
       f"gateway proxy, 5, {more}holder power, vip single within 1, 5, vip single")
      for more in ("", "zookeeper dies, 10, ")),
    *(("with ZooKeeper dead a dead holder is replaced within half a second", 10, {},
       f"zookeeper dies, {since}, holder alone has it, vip never twice, holder {fault}, holder is replaced within 0.5,"
       " 2, holder has one successor, vip hardly twice") for fault in ("power", "isolate") for since in (0.3, 20)),

    ("a deaf standby with a witness accuses nobody", 5, {},
     "first deaf, 20, first is failing, first hears nobody, first has no place, first ends deaf, 20, vip stays,"
     " vip settles"),
    *(("a standby that goes deaf takes nothing without a lock, either", 8, more, f"{before}first deaf, 5, vip stays,"
       " first ends deaf, 5, vip stays, vip never twice")
      for more, before in (({"zookeeper": False}, ""), ({}, "zookeeper dies, 10, "))),
    # there is no witness at all: it cannot be missed
    ("a standby whose own cable is out accuses nobody although it reaches ZooKeeper", 5,
     {"hosts": 2, "witness": False}, "first cable, 20, vip stays"),
    # the standby hears but one word of the whole LAN: the holder's own address; that proves no death
    ("the accused holder is no witness that the accuser can hear", 3, {},
     "gateway power, holder mute, second unheard by first, 10, vip stays"),
    # a bond fails over: its first announcement is a stranger's, its second would come too late
    ("a holder that goes on with another MAC is not accused", 20, {"rest": 2, "probe_interval": 0.02},
     "phase 0.001, holder has another MAC, 2, vip stays"),
    # who is cut off from ZooKeeper does not learn of it by the record
    ("a MAC that announced itself is believed when it answers", 5, {"rest": 2},
     "first cut, 8, holder has another MAC, 10, vip stays"),
    # what is not asked is not known to be silent
    ("where nobody asks the wire nobody takes anything on its word", 3, {"probe_count": 0},
     "zookeeper dies, 20, holder alone has it, vip never twice, holder power, 20, vip nowhere, zookeeper lives,"
     " vip single within 6"),
    # its last probe was out, the holder is back since, and the witness's old answer waits in the socket
    *(("a standby that was stopped accuses nobody on the strength of what it slept through", 3,
       {"rest": 11, "announce_interval": 0.0, "hosts": hosts, "witness": hosts == 3},
       "holder isolate, first claims next within 2, first freeze, 0.1, holder ends isolate, 2, first ends freeze, 5,"
       " vip stays") for hosts in (2, 3)),
    ("only the first standby accuses: what stands between the holder and the second one alone is no death", 3, {},
     "holder unheard by second, second unheard by holder, 10, vip stays"),
    ("the silence of the last holder says nothing about its successor, whom the next does not hear", 5, {},
     "first unheard by second, holder gives it, 10, first alone has it, vip not by accusation"),
    *(("a LAN that is dead for everybody moves nothing", 6, {"rest": 6, "witness": witness},
       "all on an island, 30, holder alone has it, world heals, 12, vip stays, vip settles")
      for witness in (True, False)),
    # whoever is heard again first says nothing about questions that were asked while nobody could be heard
    ("a LAN that comes back moves nothing, whichever question is out", 45, {},
     "all on an island, 4, phase 0.025, world heals, 5, vip stays"),
    # of three that answer each other once a second, so that two have heard enough at the same answer
    ("of three islands that meet one keeps each IP, however slowly they ask", 6,
     {"vips": 20, "zookeeper": False, "rest": 20, "probe_interval": 1.0},
     "all on an island, 20, vip begins, world heals, 6, vip single, vip no gap"),
    ("who yields while it is cut off from ZooKeeper does not take the IP back by the lock that it had", 8, {},
     "holder cut, 1, first unlock, 0.05, first ends unlock, 1, first alone has it, 1, first alone has it, 4,"
     " holder ends cut, 6, first alone has it, vip settles"),
    ("who loses its lock by a false accusation does not accuse back", 5, {"hosts": 2},
     "holder mute, first has it within 2, first mute, 0.9, first leads"),  # both do not answer now
    # its session has ended, and the holder has seen its record go; then the holder's ends, and it gets the lock
    ("a host that rejoins while the holder is cut off from ZooKeeper is no stranger", 3, {"checks": True},
     "second sick, first power, 8, holder cut, first ends power, 12, first alone has it, vip briefly twice,"
     " holder ends cut, 8, vip settles"),
    # it reaches ZooKeeper over another card; elected, it would serve an island
    ("a first standby whose LAN is dead does not keep a healthy one from the VIP", 8, {"rest": 6},
     "first isolate, 3, holder power, second has it within 5.5, 5, first lacks it, first is failing, world heals, 12,"
     " vip settles"),
    # freeze: its kernel goes on answering, the session is for that; deaf, too: by its own clock its session lives, and
    # the queue that it remembers begins with itself; kill: whoever has the lower MAC, it yields at once
    *(("a holder that goes on after it was replaced looks before it announces", 20,
       {"zookeeper": zookeeper, "rest": rest, "announce_interval": 0.5},
       f"{faults}{asleep}, vip twice, count begins, {faults.replace('holder', 'holder ends')}vip single within {limit},"
       " 2, holder lost it, holder announced nothing, vip settles, vip hardly a gap")
      for faults, asleep, limit, zookeeper, rest in (
          ("holder freeze, ", 9, 1, True, 4), ("holder deaf, holder freeze, ", 1.5, 1, True, 1),
          ("holder deaf, holder freeze, ", 3.5, 1, True, 1), ("holder isolate, holder freeze, ", 5, 1, False, 4),
          ("holder isolate, holder kill, ", 3, 0.3, False, 4))),
    # its kernel has answered, and so the one that replaced it let go; nobody has told the clients
    ("without ZooKeeper an agent that finds its address bound tells the clients", 5, {"zookeeper": False},
     "holder isolate, holder kill, 1, holder has one successor, holder ends isolate, 2, holder alone has it,"
     " count begins, holder starts, 1, holder alone has it, holder announced it, vip settles"),
    *((f"who began {fault} knows its witnesses within ten seconds when it is well", 3, {},
       f"first kill, first {fault}, first starts, 23, first ends {fault}, 12, first may accuse, vip settles")
      for fault in ("cable", "deaf", "dumb", "isolate")),
    # whose old names are replaced while the others read them
    ("who waits is known by name after all agents were replaced at once", 70, {},
     "all forget, all delay, all ends forget, 12, all ends delay, vip settles"),
    # its ZooKeeper server has not noticed yet that it has no leader
    ("a rival is not taken for the host that let go a second before", 5, {},
     "first takes it, 1.1, first has a server without a leader, first unlock, 0.2, vip twice, vip single within 1"),
    # its words come and go, and with each the holder begins to listen anew
    ("while ZooKeeper answers late a holder that has lost its lock lets go within a second", 12,
     {"vips": VIPS[1:2], "session_timeout": 2.0},
     "holder slow, holder forget, 0.05, holder ends forget, 4, vip briefly twice, vip single"),
    ("ZooKeeper may be dead for a minute and nothing moves", 3, {"vips": VIPS},
     "count begins, zookeeper dies, 60, zookeeper lives, 10, vip quiet, vip settles"),
    # its kernel answers, and the new one defends the address
    ("a binder that was stopped does not yield to who has died meanwhile", 10, {"hosts": 2, "zookeeper": False},
     "holder freeze, holder isolate, 1, first has it, holder ends isolate, 1.5, first power, 1, holder ends freeze, 5,"
     " holder alone has it, holder never unbound"),
    *(("while all checks fail the VIP stays, and when its host dies one failing host binds", 10,
       {"checks": True, "zookeeper": zookeeper},
       "first sick, 5, second sick, 5, holder sick, 25, holder alone has it, all is failing, holder power,"
       " vip somewhere within 7, 10, vip single, world heals, 8, vip settles") for zookeeper in (True, False)),
    ("a check that fails everywhere at the same time and recovers moves nothing", 70, {"checks": True},
     "all sick, 15, holder alone has it, vip never twice, all ends sick, 10, vip stays, vip never twice, vip no gap"),
    ("without ZooKeeper nobody gives an IP to hosts that fail too, and a stop does not wait for them", 6,
     {"checks": True, "zookeeper": False}, "all sick, 15, holder alone has it, vip no gap, vip never twice,"
     " holder sigterm, holder has stopped within 3, holder alone has it"),
    ("a standby whose check has failed leaves the queue, and a holder at rest is asked less often than it might", 3,
     {"checks": True, "health_check_fall": 9},
     "count begins, 1, first asked eight times, first sick, 2.5, first stands by, first has no place"),
    # a filter there drops its answers: for who has never heard one that is no silence
    ("a standby says that the holder has never answered it, and leaves it the VIP", 3, {},
     "first kill, holder mute, first ends kill, 45, first finds its holder mute, vip stays, holder ends mute, 45,"
     " first stands by, first has heard it"),
    ("of a holder that is never asked nobody says that it does not answer", 3, {"probe_count": 0},
     "45, first has heard it"),
    ("nor of one whose answers go to everybody, as they do to who has no link-local address", 3, {"vips": VIPS[1:2]},
     "first loses its link-local address, 1, first restarts, 60, first has heard it"),
    ("a stop does not wait for the next turn of a check that failed once", 6, {"checks": True, "interval": 30},
     f"{DOUBT}, holder sigterm, holder has stopped within 2, 60, vip single, vip no gap"),
    ("a host that hangs in its check gives a stopping one leave to go", 3, {"checks": True, "interval": 30,
     "health_check_fall": 9}, f"{DOUBT}, first sick, holder sigterm, holder has stopped within 3, second alone has it"),
    # the second is the first standby of a host that has yet to bind it
    ("what one host did not answer is not the silence of all", 10, {"checks": True, "interval": 30},
     f"{DOUBT}, first sick, holder gives it, 1, zookeeper dies, 8, vip hardly twice, vip no gap, vip single"),
    # the holder is letting go
    ("a host that fails right after it was given the VIP keeps what nobody else has", 20, {"checks": True},
     "second sick, 6, holder sick, first has it within 6, 0.03, phase 0.001, first sick, first is down, 10, vip single,"
     " vip hardly a gap"),
    # the session, a tick, and 1.3 s
    ("a host whose check has just failed takes the VIP when nobody has it any more, and not by order", 10,
     {"checks": True, "health_check_fall": 9},
     "second kill, 6, all sick, 2.5, holder waits alone, first takes it, 0.1, first is told to ask again,"
     " holder gives it, 0.5, holder alone has it, holder is told that nobody can, holder power,"
     " first has it within 6.5"),

    ("a host that comes back from a reboot says why it has not what it had", 3, {},
     "holder power, 5, holder ends power, 3, holder tells that it began anew, vip settles"),
    *(("a crash and a restart move nothing", 3, {"vips": VIPS, "rest": 15},
       "count begins, " + f"holder kill, {pause}, holder ends kill, 3, " * 5 +
       "holder alone has it, vip unmoved, vip no gap") for pause in (0.1, 1.0)),
    # a leader is elected anew; or none is, and the wire decides from then on
    ("a stop while ZooKeeper is away for a moment hands over without a gap", 5, {"vips": VIPS},
     "zookeeper commits nothing, phase 0.2, holder sigterm, 2.5, zookeeper commits again, 3, holder has stopped,"
     " holder lost it, vip no gap, vip single"),
    ("a stop right after ZooKeeper was lost hands over without a gap", 5, {"vips": VIPS},
     "zookeeper dies, phase 0.2, holder sigterm, holder has stopped within 8, 1, holder lost it, vip no gap,"
     " vip single"),
    ("who was stopped for seconds, and is to end, listens for who can take the VIP", 6, {"zookeeper": False},
     "holder freeze, 3, holder sigterm, phase 0.1, holder ends freeze, holder has stopped within 3, holder lost it,"
     " vip no gap"),
    *(("a stop on one of three hands over without a gap", 3, {"vips": VIPS, "zookeeper": zookeeper},
       f"holder sigterm, 5, {'holder has stopped, holder lost it, ' * zookeeper}holder starts, 4,"
       " vip settles, vip no gap")
      for zookeeper in (True, False)),
    *(("an address that nobody answers for is let go at the limit only by a deaf host", 3, {"hosts": 2},
       f"first freeze, {deaf}0.5, holder sigterm, 3, {'vip nowhere' if deaf else 'holder alone has it'},"
       " first ends freeze, holder lost it within 1") for deaf in ("", "holder deaf, ")),
    ("an adopted address goes on being announced", 3, {"announce_interval": 5.0},
     "holder kill, holder ends kill, 12, count begins, 12, holder announced it four times"),
    # it may have got another card in the meantime, or others have come from an island
    ("who begins anew tells the clients", 3, {"announce_interval": 60.0},
     "holder kill, holder has another MAC, count begins, holder ends kill, 1, holder announced it, vip settles"),
    # at once and again: one may be lost
    ("a holder whose successor is gone before it let go calls its clients back", 5,
     {"hosts": 2, "rest": 15, "announce_interval": 0.0},
     "first takes it, holder is leaving within 1, first power, count begins, first unlock, 1, holder alone has it,"
     " holder never unbound, holder announced it four times"),
    # a move while a part of the LAN was cut off; at most one: nobody there asks the wire, or has bound the address
    ("clients that come back with a contender are called", 3, {"on_lan": True, "announce_interval": 0.0, **STRICT},
     "second isolate, 6, holder gives it, 12, first alone has it, count begins, second ends isolate, 3,"
     " second has a place, first announced it"),
    *(("a stop on the only host leaves the VIP bound", 3, {"hosts": 1, "zookeeper": zookeeper},
       "holder sigterm, holder has stopped within 10, 20, holder alone has it, holder starts, 4, holder alone has it,"
       " holder never unbound, vip settles") for zookeeper in (True, False)),

    *(("at most one is never two and moves after the end of the session", 7,
       {"on_lan": True, "session_timeout": timeout, **STRICT},
       f"holder {fault}, 3, holder unbind, 12, {'holder lost it, ' * (fault != 'starve')}world heals, 10, vip settles")
      for fault in ("freeze", "kill", "cut", "power", "isolate", "starve") for timeout in (2.0, 4.0, 6.0)),
    ("at most one rests on the leader and not on a server that has lost it", 10, {"rest": 6, **STRICT},
     "holder has a server without a leader, 10, holder lost it"),
    *((f"at most one survives a restart {words}", 8, {"rest": 6, **STRICT}, script) for words, script in (
        ("unseen", "count begins, holder kill, 0.2, holder ends kill, 3, vip unmoved, vip no gap, vip settles"),
        ("no longer than its lease while ZooKeeper is away",
         "zookeeper dies, 0.3, holder kill, 0.2, holder ends kill, 4, vip nowhere, zookeeper lives, 8, vip settles"))),
    ("at most one binds again what an operator has removed", 2, {"hosts": 1, **STRICT},
     "holder unbind, holder alone has it within 1, vip settles"),
    # nothing is bound and no lifetime begun anew on the strength of one: the kernel is done when the session is
    *(("at most one rests on no old confirmation when the agent hangs", 3, {"rest": rest, **STRICT},
       f"holder cut, {late}, {removed}holder freeze, 8, holder lost it")
      for late in (1.5, 2.5, 3.0, 3.4, 3.7, 3.9) for rest in (1, 4) for removed in ("", "holder unbind, 0.05, ")),
]  # fmt: skip


@pytest.mark.parametrize("seeds, world, script", [row[1:] for row in SCENES], ids=[row[0] for row in SCENES])
def test_scene(seeds, world, script):
    story(seeds, **world)(lambda w: play(w, script))()


# -- who may accuse whom, and what moves nothing


@table("hosts, witness", [(2, False), (3, True)])
@story([1], rest=None)
def test_a_holder_that_never_answered_in_this_term_is_not_accused(w, hosts, witness):
    first = w.hosts[0]
    first.side = 1  # cut from the LAN, not from ZooKeeper
    w.begin(first).begin(*w.hosts[1:], rest=20)
    assert w.binders() == [first] and w.transitions == 1


@table("hosts, broken", [(2, "the standby is deaf, no witness"), (3, "all answers are lost")])
@story([3], witness=False)
def test_half_broken_links_do_not_send_the_vip_to_and_fro(w, first, hosts, broken):
    """Each take-over is contested, each pause is longer than the one before."""
    first.deaf = "deaf" in broken
    for host in w.hosts:
        host.mute = "lost" in broken
    moves = []
    for _ in range(4):
        before = w.count(" binds ")
        w.run(30)
        moves.append(w.count(" binds ") - before)
    assert moves[0] <= 15 and moves[-1] <= 3, moves


@story(12, vips=2)
def test_an_ip_that_stays_silent_and_cannot_be_taken_slows_down_no_other_one_of_its_holder(w, seed, holder):
    answers = holder.answers
    holder.answers = lambda address: address != w.address and answers(address)
    w.server.refuses = lambda host, call, path: call == "multi" and w.address in str(path)
    w.run(1 + 0.1 * seed)
    holder.power_off()
    assert w.run(3, until=lambda: [h for h in w.binders(w.vips[1]) if h is not holder]) < 0.35


# -- a loop that was late: look first, act after


def test_three_agents_that_start_at_the_same_instant_without_zookeeper_agree_on_one():
    two = 0
    for seed in range(100):
        with World(seed, zookeeper=False) as w:
            for host in w.hosts:
                host.start()
            w.run(1)
            assert len(w.binders()) == 1 and w.worst_two < 0.1, seed
            two += w.worst_two > 0
    assert two <= 10  # most see the others' last probes, and wait


@table("vips, seeds", [(1, 20), (20, 4), (100, 1)])
@story(zookeeper=False)
def test_of_two_unconfirmed_binders_the_lower_mac_is_left_within_a_second_of_the_heal(w, holder, vips, seeds):
    holder.side = 1
    w.run(5)
    best = min(w.binders(), key=lambda h: h.mac)
    holder.side = 0
    w.wire.sent.clear()
    play(w, "vip single within 1.05")
    asked = sum(count for (_, kind), count in w.wire.sent.items() if kind == "asks")
    assert asked <= 12 * vips + 60, "who hears a rival asks for its IPs once, not at each answer"
    assert all(w.binders(vip) == [best] for vip in w.vips)
    w.run(2)
    w.settled()


# -- health checks


# -- stops, restarts and planned moves


@story(24)
def test_of_three_hosts_that_stop_at_nearly_the_same_time_one_keeps_the_vip(w, seed):
    w.run((seed % 20) * 0.05)
    for host in w.rng.sample(w.hosts, 3):
        host.sigterm()
        w.run((0.0, 0.002, 0.02, 0.2)[seed % 4])
    assert w.run(10, until=lambda: not any(host.agent for host in w.hosts)) < 3
    assert len(w.binders()) == 1 and not w.worst_gap


@story(40, rest=None)
def test_the_binder_is_preferred_after_the_data_of_zookeeper_was_wiped(w, seed):
    for host in w.hosts:  # all at once: their places in the queue and their frames cross
        host.start()
    w.run(4)
    holder = w.holder()
    w.server.stop()
    w.run(random.Random(seed).choice((2.0, 10.0)))
    w.server.begin(wiped=True)
    w.run(15)
    assert w.binders() == [holder] and w.names()[0] == holder.name
    w.settled()


@table("call", ["take_lock", "failover"])
@story([9])
def test_planned_moves_have_no_gap_and_end_at_once(w, call):
    for _ in range(20):
        old, new = w.holder(), w.others()[0]
        (new if call == "take_lock" else old).ask(call)
        w.run(0.5)
        assert w.binders() == [new] and w.calls[-1][3].done() and w.calls[-1][3].exception() is None
        w.run(1)
    assert w.worst_gap == 0 and w.worst_two < 0.1


@story(40)
def test_a_successor_that_speaks_before_its_lock_is_known_is_asked_again_at_once(w, holder, first):
    first.ask("take_lock")
    w.run(1)
    assert w.binders() == [first] and w.worst_gap == 0 and w.worst_two < 0.08


@table("vips", [VIPS[:1], VIPS[1:2]])
@table("order", ["take_lock", "failover", "sigterm", "delete_ip", "sick"])
@story(12, checks=True, zookeeper=False)
def test_without_zookeeper_an_order_moves_the_vip_with_no_gap(w, holder, second, order, vips):
    if order == "delete_ip":
        vars(holder.agent.config)["virtual_ips"] = []  # as if it had been added by the API
    if order in ("sigterm", "sick"):
        w.fault(order, holder)
    else:
        (second if order == "take_lock" else holder).ask(order)
    w.run(5)
    assert len(w.binders()) == 1 and w.binders() != [holder]
    assert order != "take_lock" or w.binders() == [second]
    assert w.worst_gap == 0 and w.worst_two < 0.25, (w.worst_gap, w.worst_two)
    assert all(future.done() and not future.exception() for *_, future in w.calls), w.calls
    assert order != "sigterm" or holder.agent is None


@table("zookeeper", [True, False])
@story([1])
def test_a_word_that_nobody_who_may_say_it_has_said_is_not_heeded(w, holder, first, zookeeper):
    """With ZooKeeper the lock alone decides; without, who is to take it is told by itself: several would, else."""
    of_lock = [(Kind.GIVE, holder, first.mac), (Kind.WANT, first, holder.mac)]
    for kind, sender, to in of_lock if zookeeper else [(Kind.GIVE, holder, b"\xff" * 6)]:
        w.wire.send(sender, link.Frames(sender.mac, {}).ask(w.vips[0].ip, to, kind))
    play(w, "3, vip stays")


@table("loss", [0.0, 0.5])
@story(40, hosts=4, zookeeper=False)
def test_without_zookeeper_two_that_take_an_ip_at_once_get_it_one_after_the_other(w, seed, first, second, loss):
    w.wire.loss = loss
    first.ask("take_lock")
    w.run((0.0, 0.001, 0.01, 0.06)[seed % 4])
    second.ask("take_lock")
    w.run(0.1)
    w.wire.loss = 0.0
    w.run(6)
    assert len(w.binders()) == 1 and (loss or w.holder() in (first, second))
    assert w.worst_gap == 0 and w.worst_two < (0.5 if loss else 0.1), (w.worst_gap, w.worst_two)
    assert all(future.done() and not future.exception() for *_, future in w.calls), w.calls


@story(20, zookeeper=False)
def test_without_zookeeper_who_gave_an_ip_can_take_it_back_at_once(w, holder, first):
    for host in (first, holder):
        host.ask("take_lock")
        assert w.run(1, until=lambda host=host: w.binders() == [host]) < 0.2
    w.run(3)
    assert w.binders() == [holder] and w.worst_gap == 0


@story(20, hosts=4, zookeeper=False)
def test_of_two_that_were_told_to_take_an_ip_one_yields_at_once(w, holder):
    """The holder, who goes, heard nothing of the first one and told the next."""
    first = min((host for host in w.hosts if host is not holder), key=lambda host: host.mac)
    w.wire.broken |= {(first.name, host.name) for host in w.hosts}
    w.fault("sigterm", holder)
    assert w.run(1, until=lambda: len({*w.binders()} - {holder}) == 2) < 1
    w.wire.broken.clear()
    w.run(5)
    assert len(w.binders()) == 1 and not w.worst_gap and w.worst_two < 0.5, (w.worst_gap, w.worst_two)


@story([2])
def test_an_address_without_an_end_is_let_go_at_a_start_where_at_most_one_is_promised_now(w, holder):
    holder.kill()
    w.config["promise"] = "at-most-one"
    w.server.stop()
    holder.start()
    w.run(0.01)
    assert not w.binders()


@story([2], **STRICT)
def test_an_adopted_address_outlives_its_lifetime_where_the_promise_has_changed(w, holder):
    holder.kill()
    w.config["promise"] = "at-least-one"
    holder.start()
    w.run(10)
    assert w.binders() == [holder] and "the lifetime ends of" not in str(w.history)


@story(5)
def test_an_address_stays_for_a_moment_when_its_new_holder_is_heard(w, first):
    """Requests are still on their way to the old one."""
    first.ask("take_lock")
    w.run(1, until=lambda: len(w.binders()) == 2)
    assert 0.05 <= w.run(1, until=lambda: len(w.binders()) == 1) < 1


@table("vips", [1, 50])
@table("zookeeper", [True, False])
@story([10], announce_interval=0.0, rest=20)
def test_at_rest_the_wire_is_quiet(w, vips, zookeeper):
    holders = len([h for h in w.hosts if h.bound])
    w.wire.sent.clear()
    w.run(20)
    rates = {h.name: w.wire.sent[h.name, "asks"] / 20 for h in w.hosts}
    assert not any(w.claims(h) for h in w.hosts)
    assert all(rate <= 25 * max(1, holders) for rate in rates.values()), rates
    if zookeeper and holders == 1:
        assert rates[w.holder().name] == 0 and rates[w.others()[1].name] <= 1.2, rates


# -- IPs that come and go

ADDED = link.ipaddress.ip_interface("192.0.2.150/32")
NEW = {"ip": str(ADDED)}


def add_to_all(w: World) -> None:
    """By the API, one after another."""
    for host in w.hosts:
        host.ask("add_ip", NEW)
        w.run(0.5)
    w.run(2)


@table("outage", [True, False])
@story(3)
def test_a_host_that_an_ip_is_deleted_from_leaves_no_node_that_would_keep_the_others_out(w, outage):
    add_to_all(w)
    holder, first = w.holder(ADDED), w.host(w.names(ADDED)[1])
    if outage:
        w.server.stop()
        w.run(1)
    first.ask("delete_ip", str(ADDED.ip))
    w.run(3)
    w.server.begin()
    w.run(8)
    assert first.name not in w.names(ADDED) and len(w.names(ADDED)) == 2
    holder.power_off()
    assert w.run(8, until=lambda: w.binders(ADDED)) < 8


@table("pause", range(14))
@story([1])
def test_a_post_and_a_delete_at_any_distance_leave_no_node_behind(w, pause):
    one, two, _ = w.hosts
    one.ask("add_ip", NEW)
    w.run(0.5)
    two.ask("add_ip", NEW)
    w.run(pause / 1000)
    two.ask("delete_ip", str(ADDED.ip))
    w.run(2)
    assert w.names(ADDED) == [one.name] and w.binders(ADDED) == [one]


@table("pause", [0.0, 0.001, 0.003, 0.01])
@table("calls", [("take_lock", "delete_ip"), ("take_lock", "failover"), ("delete_ip", "take_lock")])
@story([1])
def test_orders_that_cross_are_all_answered(w, calls, pause):
    add_to_all(w)
    second = w.host(w.names(ADDED)[1])
    for call in calls:
        second.ask(call, str(ADDED.ip))
        w.run(pause)
    w.run(5)
    assert all(future.done() for *_, future in w.calls) and len(w.binders(ADDED)) == 1


@table("pause", [0.0, 0.003, 0.006])
@story([1])
def test_an_agent_that_is_stopped_before_it_has_read_the_queue_hands_over_what_it_has_adopted(w, holder, pause):
    """Who waits is not known yet: to end at once would leave the address on this host and on its successor."""
    holder.restart(0.0, pause)
    holder.sigterm()
    w.run(8)
    assert holder.agent is None and len(w.binders()) == 1 and w.binders() != [holder]


@table("zookeeper, slow, span", [(True, 0, 0.02), (True, 0, 0.1), (True, 0, 0.3), (True, 0.25, 0.35), (True, 0.25, 1),
                                 (False, 0, 0.02), (False, 0, 0.1), (False, 0, 0.3)])  # fmt: skip
@story(100, vips=VIPS[:2])
def test_of_all_hosts_that_are_stopped_at_nearly_the_same_time_one_keeps_each_ip(w, seed, slow, span, zookeeper):
    """Who was given it hears its predecessor until that lets go, late beside a slow ZooKeeper: it is no successor."""
    w.server.slow = slow
    for host in w.hosts:
        w.after(w.rng.uniform(0, span), host.sigterm)
    w.run(11)
    assert [len(w.binders(vip)) for vip in w.vips] == [1, 1] and not any(host.agent for host in w.hosts)


@table("zookeeper", [True, False])
@story(25, vips=VIPS[:2])
def test_who_was_given_an_ip_and_is_stopped_in_turn_gives_it_to_the_third(w, seed, holder, zookeeper):
    """It hears its predecessor, which lets go, last: that has not taken it back."""
    holder.sigterm()
    w.run(0.02 + 0.01 * seed)
    given = next(host for host in w.hosts if host is not holder and host in w.binders())
    given.sigterm()
    w.run(9)
    third = [host for host in w.hosts if host not in (holder, given)]
    assert [w.binders(vip) for vip in w.vips] == [third, third] and w.worst_gap == 0


@table("pause, reload", [(0.0, False), (0.05, False), (0.0, True)])
@story([1])
def test_who_is_stopped_when_the_queue_was_emptied_waits_for_those_who_ask_for_the_ip_to_join_it(
    w, holder, first, second, pause, reload
):
    """They let the binder go first. Else the address would stay on it, and they would take it."""
    for host in (first, second) if reload else ():
        host.reload()
    for node in [node for node in w.server.nodes if "__lock__" in node]:
        w.server.delete(node)
    w.run(pause)
    holder.sigterm()
    w.run(8)
    assert holder.agent is None and len(w.binders()) == 1 and w.binders() != [holder]


@story([1])
def test_a_stop_that_comes_after_an_execution_was_decided_is_the_next_programs_and_takes_no_session_from_it(w, holder):
    session, agent = holder.kazoo.client_id, holder.agent
    agent.loop.post(setattr, agent, "execute", lambda: None)
    agent.loop.post(agent.stop)
    w.run(3)
    assert holder.agent not in (None, agent) and holder.kazoo.client_id == session and w.binders() == [holder]


@table("promise", ["at-least-one", "at-most-one"])
@table("role", ["holder", "first"])
@story([1])
def test_an_ip_that_a_reload_takes_out_of_one_host_is_served_by_the_others(w, holder, first, role, promise):
    changed = holder if role == "holder" else first
    ips, w.config["ips"] = w.config["ips"], []
    changed.restart(0.3)
    w.config["ips"] = ips
    w.run(8)
    assert changed.agent and not changed.agent.vips and changed not in w.binders()
    assert w.names() and changed.name not in w.names() and len(w.binders()) == 1
    assert w.worst_gap == 0 or promise == "at-most-one"
    w.holder().power_off()
    assert w.run(9, until=w.binders) < 9


# -- what ZooKeeper may say, and what it refuses


@table("name, owner", [
    ("0123456789ab4def" "8123456789abcdef", "another program"),  # as kazoo's Lock makes it
    ("0123456789abcdef" "0123456789abcdef", "?"),  # a LinK host's, whose record is missing
    ("_c_0123-lock", "another program"),
])  # fmt: skip
@story([1])
def test_a_lock_node_of_somebody_unknown_has_its_place_in_the_queue_unread(w, name, owner):
    read = []
    w.server.refuses = lambda host, call, path: read.extend([path] * (call == "get" and "/ips/" in path))
    w.server.put(f"/link/ips/192.0.2.101/{name}__lock__0000000000", b"data", 0x999)
    w.run(3)
    assert all(host.managed().state is not State.ACTIVATED or host is w.hosts[0] for host in w.hosts)
    assert Lock.MINE not in [host.managed().lock(w.time).lock for host in w.hosts]
    assert len(w.binders()) == (owner == "?")  # who answers for a stranger's lock is not heard
    assert {link.show(h.managed(), w.time)["holder"] for h in w.hosts} == {owner} and not read
    w.hosts[1].ask("take_lock")
    w.run(1)
    assert bool(w.count("foreign lock")) == (owner != "?")


@story([1], rest=None)
def test_a_lock_node_that_no_session_ends_as_in_a_copy_of_the_data_keeps_nobody_out(w):
    node = f"/link/ips/{w.address}/0123456789abcdef0123456789abcdef__lock__0000000000"
    w.server.ensure_path(node.rpartition("/")[0])
    w.server.put(node, b"node1", 0)
    w.begin(*w.hosts, rest=5)
    assert node not in w.server.nodes and len(w.binders()) == 1


@table("refused", [False, True])
@story([1], rest=None)
def test_a_record_of_our_name_that_no_session_ends_as_in_a_copy_or_made_by_hand_is_nobodys_and_removed(w, refused):
    first, node = w.hosts[0], f"/link/hosts/{w.hosts[0].name}"
    w.server.ensure_path("/link/hosts")
    w.server.put(node, b"{}", 0)
    w.server.refuses = lambda host, call, path: refused and (call, path) == ("delete", node)
    w.begin(*w.hosts, rest=5)
    said = first.agent.health()["zookeeper"]["refused"] or ""
    assert ("refuses delete in /link/hosts" in said) is refused and "another host" not in said
    w.server.refuses = lambda *_: False
    w.run(3)
    assert first.agent.health()["healthy"] and w.server.get(node)[1].ephemeralOwner == first.kazoo.client_id[0]


@story([1])
def test_another_programs_lock_is_that_also_where_a_hosts_record_is_a_node_that_lasts(w):
    name = w.hosts[0].name
    w.server.put("/link/hosts/copy", w.server.get(f"/link/hosts/{name}")[0], 0)
    w.run(1)
    w.server.put("/link/ips/192.0.2.101/_c_0123-lock__lock__0000000000", b"data", 0x999)
    w.run(3)
    assert {link.show(h.managed(), w.time)["holder"] for h in w.hosts} == {"another program"}


@story([1])
def test_a_second_node_of_this_host_is_removed(w, first):
    """As it is left where the answer to a create was lost, and it came late, too."""
    node = f"{first.kazoo.client_id[0]:016x}0123456789abcdef__lock__9999999999"
    w.server.put(f"/link/ips/{w.address}/{node}", first.name.encode(), first.kazoo.client_id[0])
    assert w.names().count(first.name) == 2
    w.run(1)
    assert w.names().count(first.name) == 1


@story([1])
def test_who_has_lost_its_own_place_breaks_no_lock(w, holder, first):
    lost = []

    def refuses(host: Host, call: str, path: Any) -> None:
        if call == "multi" and not lost:
            lost.extend(path for name, _, path in w.queue() if name == first.name)
            w.server.delete(lost[0])

    w.server.refuses = refuses
    w.fault("power", holder)
    assert w.run(1, until=lambda: lost) < 1 and holder.name in w.names()


@story([1])
def test_sessions_that_have_ended_are_forgotten(w, first, second):
    for _ in range(5):
        second.kill()
        second.start(keep=False)
        w.run(6)
    assert len(first.agent.referee._hosts.owners) <= 4


@story([1])
def test_of_many_records_each_is_read_when_it_is_new_or_another_and_none_is_told_by_itself(w, holder):
    """A thousand strangers' nodes, read anew at each change and told one by one, kept every agent off ZooKeeper."""
    read, told, names = list[str](), list[str](), [f"/link/hosts/stranger{n}" for n in range(100)]
    w.server.refuses = lambda host, call, path: read.extend([path] * (call == "get" and host is holder))
    news = holder.agent.referee._news
    holder.agent.referee._news = lambda address: (told.append(address), news(address))
    for name in names:
        w.server.put(name, b"", 0x999)
    w.run(1)
    assert sorted(read) == sorted(names) and told.count("") < 60
    read.clear()
    w.server.set(names[7], json.dumps(link.Record("02:00:00:00:00:07")._asdict()).encode())
    w.run(1)
    assert read == [names[7]] and holder.agent.peers["stranger7"].mac == "02:00:00:00:00:07"
    for name in names:
        w.server.delete(name)
    w.run(1)
    assert len(holder.agent.peers) == 2 and len(holder.agent.referee._hosts.asked) == 3


@story([1])
def test_while_zookeeper_is_lost_nobody_is_called_the_holder_for_having_been_it(w, holder, first, second):
    w.server.stop()
    w.run(8)
    holder.power_off()
    w.run(3)
    shown = {host.name: link.show(host.managed(), w.time)["holder"] for host in (first, second)}
    assert shown == {host.name: host.name if host.bound else None for host in (first, second)}


@table("promise", ["at-least-one", "at-most-one"])
@story(range(1, 9), rest=6)
def test_when_kazoos_thread_dies_its_client_is_ended_and_another_one_goes_on_with_the_session(w, holder, promise):
    clients, session = dict[SimKazoo, None](), holder.kazoo.client_id
    for _ in range(300):  # three seconds in which each new one dies, too
        if holder.kazoo.client_state != "CLOSED":
            clients[holder.kazoo] = None
            holder.kazoo.die()
        w.run(0.01)
    assert 3 <= len(clients) <= 5 and [client.stopped for client in clients].count(False) <= 1
    w.run(3)
    assert holder.kazoo.client_id == session and w.binders() == [holder] and w.transitions == 1


@story(8)
def test_a_stop_right_after_a_restart_waits_for_zookeepers_word_and_hands_over(w, holder):
    holder.kill()
    holder.start()
    holder.sigterm()
    w.run(8)
    assert not holder.agent and len(w.binders()) == 1 and w.binders() != [holder]


@story([1])
def test_what_is_asked_when_the_connection_is_gone_and_nobody_has_said_so_yet_is_not_kept_for_later(w, first):
    first.kazoo.line = None
    first.agent.referee.want(w.address, link.Want.FIRST)
    first.agent.referee.ask()
    assert not first.kazoo._calls


@story([1])
def test_nothing_is_written_in_the_name_of_a_session_that_has_ended_though_nobody_has_said_so_yet(w, holder, first):
    """A lock node with the old session's name would last as long as the new session: no host would call it its own."""
    client, referee = first.kazoo, first.agent.referee
    old = client.client_id
    w.server.end(referee._own)
    with mock.patch.object(first.agent.loop, "serve"):  # it is behind its time
        w.run(3, until=lambda: client.client_id not in (None, old))
        assert client.client_id != referee.session == old
        referee.want(w.address, link.Want.FIRST)
        referee.ask()
        assert not client._calls


@story([1])
def test_who_reads_all_anew_again_and_again_has_one_watch_of_each_node(w, holder):
    """kazoo keeps each that is another, until it fires: with a refusal that lasts more and more of them."""
    for _ in range(9):
        holder.agent.referee.distrust()
        w.run(1)
    assert {len(watches) for watches in holder.kazoo._watches.values()} == {1}


@story([1])
def test_a_directory_that_is_there_already_is_no_word_of_the_leader(w, holder):
    """Who makes one by asking first whether it is there may have had its answer from a server without a leader."""
    said = []
    w.server.part(holder, leader=False)

    def late(host: Host, call: str, path: str) -> None:
        said.extend([path] * (call == "get_children"))
        if call == "get_children" and len(said) == 1:
            raise kazoo.NoNodeError  # so it was, a moment ago

    w.server.refuses = late
    referee, began = holder.agent.referee, w.time
    referee._fired(w.address, "", None)
    w.run(0.2)
    assert said and referee.age(w.time) > w.time - began


@story(20)
def test_a_listing_from_before_a_suspension_makes_nobody_believe_in_its_lock(w, seed, holder):
    """It was asked for before, and its answer waits in the inbox."""
    vip, seen = holder.managed(), list[Lock]()
    holder.agent.referee._places[w.address].watch(None)
    w.run(0.0005 + 0.0001 * seed)
    play(w, "holder deaf, holder freeze, 1.5, holder ends deaf, holder ends freeze")
    woke = w.time
    for _ in range(250):
        w.run(0.0002)
        if holder.agent.loop.now > woke:  # it has gone round
            seen.append(vip.lock(w.time).lock)
    assert seen and Lock.MINE not in seen


@table("path, data", {
    "/link/ips/192.0.2.101/x__lock__9999999999": None,
    "/link/hosts/no address": b'{"mac": "", "addresses": ["nonsense"], "boot": ""}',
    "/link/hosts/no end": b"[" * 100000,
    "/link/hosts/a strange MAC": b'{"mac": "xyz", "addresses": [], "boot": ""}',
}.items())  # fmt: skip
@story([1])
def test_strange_data_in_zookeeper_stops_no_agent(w, holder, path, data):
    w.server.put(path, data, 0x999)
    w.run(5)
    assert w.binders() == [holder] and all(host.runs for host in w.hosts)
    holder.restart(0.3, 5)
    assert w.binders() == [holder] and holder.runs


@table("refused", ["create", "join", "get_children"])
@story([1], rest=None, hosts=1)
def test_what_zookeeper_refuses_is_asked_again_but_not_in_a_tight_loop(w, refused):
    asked = []
    joins = refused == "join"

    def refuses(host: Host, call: str, path: Any) -> bool:
        if call != ("create" if joins else refused) or (joins and "__lock__" not in str(path)):
            return False
        asked.append(path)
        return "/ips" in str(path)

    w.server.refuses = refuses
    w.begin(rest=20)
    assert 5 < len(asked) < 100, len(asked)
    assert w.binders() == w.hosts, "who cannot join a queue has no word of ZooKeeper, and asks the wire"
    w.server.refuses = lambda *_: False
    w.run(3)
    assert w.queue() and w.binders() == w.hosts


@story(10)
def test_a_read_that_is_refused_once_does_not_make_two_hosts_believe_in_their_locks_for_ever(w, holder):
    read = Counter[str]()

    def once(host: Host, call: str, path: str) -> bool:
        read[host.name] += call == "get_children" and "/ips/" in path
        return call == "get_children" and "/ips/" in path and read[host.name] == 1

    w.server.refuses = once
    w.fault("unlock", holder)
    w.run(8)
    assert len(read) == 3 and sum(read.values()) >= 3
    w.settled()


@story([1])
def test_a_refusal_confirms_no_lock_and_is_said(w, holder, first):
    w.server.refuses = lambda host, call, path: call == "get_children" and "/ips/" in path
    holder.kill()  # a change that everybody is told of, and nobody may read
    w.run(12)
    health = first.agent.health()
    assert "NoAuthError" in health["zookeeper"]["refused"] and not health["healthy"]
    assert first.managed().lock(w.time).lock is Lock.UNKNOWN


@table("zookeeper", ["zookeeper:2181", "zookeeper:2181/other"])
def test_two_clusters_that_do_not_know_each_other_say_that_they_share_an_ip_until_one_has_it_no_more(zookeeper):
    """As by a chroot that one host names, and the other does not."""
    with World(3, hosts=2) as w:
        one, other = w.hosts
        other.settings = {"zookeeper": zookeeper}
        w.begin(one, other, rest=8)
        shared = zookeeper.endswith("/other")
        for _ in range(5):
            assert {"is on two hosts" in str(host.agent.health()["trouble"]) for host in w.hosts} == {shared}
            w.run(30)
        assert len(one.agent.health()["history"]) == shared and len(w.binders()) == 1 + shared
        other.power_off()
        w.run(15)
        assert not one.agent.health()["trouble"]


@table("seed", range(5))
def test_an_address_that_a_host_has_for_itself_is_bound_by_no_other_one(seed):
    """As where somebody wrote a server's own address into the list of IPs that all have."""
    with World(seed, vips=["192.0.2.1/32"]) as w:
        owner, *others = w.hosts
        w.begin(*w.hosts, rest=10)
        assert not w.binders() and not w.count(" binds ")
        for host in others:
            assert "h1 has the address for itself" in host.managed().reason
        assert "this host, or its network, has the address for itself" in owner.managed().reason
        owner.power_off()
        w.run(3)
        assert not w.binders(), "nor as the last resort, while it may come back"


@table("call", ["take_lock", "failover"])
@story([1, 2, 3])
def test_an_order_that_zookeeper_refuses_is_answered_with_what_it_refuses(w, holder, first, call):
    """As where its ACL lets this host only read."""
    w.server.refuses = lambda host, call, path: call in ("create", "delete", "multi") and "/ips/" in str(path)
    (first if call == "take_lock" else holder).ask(call)
    w.run(4)
    error = w.calls[0][3].exception()
    assert error.status == 504 and "NoAuthError; see zookeeper_auth, its ACL and quota" in error.body["detail"]
    w.server.refuses = lambda *_: False
    w.run(3)
    w.settled()


@story([1], vips=60)
def test_the_ips_of_a_dead_host_are_taken_in_few_transactions(w, holder, first):
    w.fault("power", holder)
    w.run(0.5)
    assert len(first.bound) == 60 and w.count("breaks a lock") <= 6


@story([1], vips=400)
def test_until_all_that_a_dead_host_had_is_bound_nothing_of_it_is_announced_twice(w, holder, first):
    vips, followed = [*first.agent.vips.values()], w.server.watched("/ips/")
    due = [vip for vip in vips if vip.seen.place == 1 and vip.seen.queue[0].host == holder.name]
    w.fault("power", holder)
    w.run(1, lambda: all(vip.bound for vip in due))
    w.run(0.11)  # a real kernel and a real ZooKeeper take longer than the simulated ones
    assert len(due) > 64 and {vip.story.announced for vip in due} == {1}
    w.run(2)
    assert w.server.watched("/ips/") == followed * 2 / 3, "each is followed as before"


@story([1], vips=60)
def test_a_lock_that_cannot_be_taken_holds_up_no_other(w, holder, first):
    asked = list[str]()

    def refuses(host: Host, call: str, path: Any) -> bool:
        asked.extend([call] * (call == "multi"))
        return call == "multi" and w.address in str(path)

    w.server.refuses = refuses
    w.fault("power", holder)
    w.run(0.7)
    assert len(asked) <= 20, "what is wrong is found by halves"
    locks = [vip.seen.lock for vip in first.agent.vips.values()]
    assert locks.count(Lock.MINE) == 59 == len(first.bound), locks


@story([1], vips=20, rest=15.0)
def test_that_zookeeper_has_been_silent_for_too_long_is_news_to_every_ip_at_rest(w, holder):
    w.server.stop()
    w.run(6)
    assert all("without a lock" in vip.reason for vip in holder.agent.vips.values())


@story([1])
def test_a_host_that_leaves_is_a_witness_no_more(w, holder, second):
    assert second.own[4] in holder.agent.wire.known()
    w.fault("sigterm", second)
    w.run(3)
    assert second.own[4] not in holder.agent.wire.known() and second.name not in holder.agent.peers


@story([1])
def test_what_was_to_be_taken_is_forgotten_with_the_session(w, holder, first):
    referee = first.agent.referee
    referee.want(w.address, link.Want.FIRST)
    assert referee._takes
    referee._on_state(None, True)
    w.run(1)
    assert w.binders() == [holder] and not w.count("breaks a lock")


@table("again", [True, False])
@story([1], promise="at-most-one")
def test_a_listing_that_answers_a_doubt_is_news_though_it_says_the_same(w, holder, again):
    with mock.patch.object(holder.agent.referee, "_news") as news:
        w.server._reset(holder.kazoo.line) if again else holder.agent.referee.distrust(w.address)
        w.run(1)
    assert mock.call(w.address) in news.mock_calls


@table("zookeeper", [True, False])
@story([1], vips=20, rest=15.0)
def test_at_rest_time_alone_is_no_reason_to_decide_again(w, holder, first, zookeeper):
    with mock.patch.object(link, "decide", side_effect=link.decide) as decide:
        w.run(10)
    assert len(holder.bound) == 20 and decide.call_count < 20 * 3 * 2.5, "each IP, host; to be asked is no news"


@story(3, vips=100)
def test_who_takes_many_ips_at_once_decides_twice_for_each_and_has_them_before_it_lists_their_queues_anew(
    w, holder, first
):
    decided, listed, had = Counter[str](), list[str](), len(first.bound)
    reconcile, get_children = link.Vip.reconcile, first.kazoo.get_children_async

    def counted(vip, now):
        decided[vip.vip.address] += vip.agent is first.agent and not vip.bound
        return reconcile(vip, now)

    def noted(path, **more):
        listed.append(path)
        return get_children(path, **more)

    with mock.patch.object(link.Vip, "reconcile", counted), mock.patch.object(first.kazoo, "get_children_async", noted):
        holder.power_off()
        assert w.run(3, until=lambda: len(first.bound) == 100) < 0.5
        assert max(decided.values()) == 2 and len(listed) < 3
        w.run(3)
        assert len({*listed}) == 100 - had, "each is followed all the same"


@story([1], rest=None, hosts=1, vips=300)
def test_no_more_requests_are_out_at_once_than_leave_the_loop_its_time(w):
    (host,), most = w.hosts, 0
    host.start()
    for _ in range(400):
        w.run(0.005)
        most = max(most, len(host.kazoo._calls) if host.kazoo else 0)
    assert most == link.Referee.WINDOW and len(host.bound) == 300


SAME_NAME = {  # the MAC and the boot id of who comes later are the same as the first one's -> who that is
    (True, True): "its successor", (True, False): "a stranger",  # rebooted, or a restored copy
    (False, True): "a stranger",  # two agents for two interfaces of one host, two containers with an image's name
    (False, False): "a stranger",
}  # fmt: skip


@table("alive", [True, False])
@table("name, mac, boot", [*itertools.product((True, False), repeat=3)])
def test_who_comes_up_beside_a_host_is_its_successor_a_stranger_or_another_host(name, mac, boot, alive):
    """A successor ends what an earlier process left; a stranger waits until that session is over, and says so."""
    with World(1, hosts=4) as w:
        first, second, third, new = w.hosts
        new.name, new.mac = first.name if name else new.name, first.mac if mac else new.mac
        new.boot = first.boot if boot else 7
        w.begin(first, second, third)
        if not alive:
            w.fault("power", first)
        new.start()
        w.run(1)
        who = SAME_NAME[mac, boot] if name else "another host"
        refused = "is taken in ZooKeeper by another host" in str(new.agent.health()["zookeeper"])
        twin = mac and not name  # each tells of the other
        assert refused is (who == "a stranger")
        assert new.agent.health()["healthy"] is not (refused or twin)
        w.run(20)
        assert new.agent.health()["healthy"] is not ((refused or twin) and alive)
        assert w.binders() == [first if alive and who != "its successor" else second] and not w.wrong
        assert w.worst_gap < 0.3 and w.worst_two < 0.1 and (not alive or not w.count("breaks a lock"))
        assert w.server.zxid < 150, "they wage no war of deletions"
        if alive and who != "its successor":
            assert w.count(" binds ") == 1 and not w.count("ZooKeeper session")
            assert first.agent.health()["healthy"] is not twin


@story([1])
def test_another_spelling_of_the_ensemble_moves_nothing_at_a_rolling_reload(w):
    w.config["zookeeper"] = "zookeeper:2181,another:2181"
    for host in w.hosts:
        host.restart(0.2, 3)
    play(w, "vip stays, vip no gap")
    assert w.transitions == 1


@story([1], vips=300)
def test_an_order_after_many_ips_were_taken_waits_for_no_listing_of_others(w, holder, first, second):
    had = {*first.bound, *second.bound}
    w.server.slow = 0.08
    holder.power_off()
    assert w.run(20, until=lambda: len({*first.bound, *second.bound}) == len(w.vips)) < 20
    w.run(1.2)
    taken = [vip for vip in first.bound if vip not in had]
    busy = [vip for vip in taken if first.agent.referee._places[BARE(vip)].busy]  # they are still being listed
    ordered = (busy or taken)[-1]
    first.ask("failover", BARE(ordered))
    assert w.run(5, until=lambda: ordered in second.bound) < 1


@table("witness", [True, False])
def test_without_zookeeper_who_loses_holder_and_gateway_at_once_takes_the_ip_when_nobody_is_heard_for_long(witness):
    """A second witness, if there is one, makes it as quick as ever."""
    with World(1, zookeeper=False, witnesses=[GATEWAY, *["192.0.2.253"] * witness]) as w:
        w.stations.append(Host(w, "printer", b"\2\0\0\0\0\xfb", {4: "192.0.2.253"}, powered=True))
        w.begin(*w.hosts, rest=15)
        holder = w.holder()
        holder.power_off(), w.gateway.power_off()
        waited = w.run(13, until=lambda: [host for host in w.binders() if host is not holder])
        assert waited < 0.5 if witness else 9 < waited < 12


@story([1, 2, 3])
def test_who_moves_to_another_chroot_leaves_no_place_in_the_queue_that_it_left(w, holder, first, second):
    """Nobody would ever give that up: when the holder dies, it would be the next one's."""
    first.settings = {"zookeeper": "zookeeper:2181/other", "ips": []}
    first.restart(0.3)
    w.run(8)
    assert w.names() == [holder.name, second.name]
    holder.power_off()
    w.run(1)
    assert w.binders() == [second]


# -- schedules: the tests above are quicker to find a bug


def test_a_minute_of_fresh_schedules_finds_nothing() -> None:
    first = random.SystemRandom().randrange(1 << 32)
    print(f"from seed {first}")
    found = hunt(first, 1, 60.0)
    assert found.schedules > 20 and not found.failed, "\n".join(
        f"python tests/test_sim.py --seed {seed}: {wrong}" for seed, wrong in found.failed.items()
    )


FOUND = (70, 947690)  # what these have found is mended


@table("seed", FOUND)
def test_what_a_schedule_has_found_stays_mended(seed):
    assert not storm(seed, versions=False).wrong


@table("zookeeper", [True, False])
def test_a_rolling_upgrade_from_an_earlier_version_moves_nothing(zookeeper):
    world = World(1, vips=VIPS, zookeeper=zookeeper)
    world.programs.append(earlier(BEFORE))
    for host in world.hosts:
        host.program = earlier(BEFORE)
    with world:
        world.begin(rest=10)
        holders, moved = [world.binders(vip) for vip in world.vips], world.transitions
        for host in world.hosts:
            host.reload()
            world.run(4)
        world.settled()
        assert [world.binders(vip) for vip in world.vips] == holders and world.transitions == moved
        assert {host.program for host in world.hosts} == {link}
        assert not world.worst_gap and not world.worst_two and not world.wrong


# -- bugs that are planted


def test_every_mutant_can_be_planted():
    text = Path(link.__file__).read_text(encoding="utf-8")
    assert len({mutants.plant(name, text) for name in mutants.MUTANTS}) >= 12


@table("name", ["skips the witness", "ignores a rival's claim", "a timer never cancelled"])
def test_the_suites_find_a_mutant(name):
    assert mutants.find(name).by


# -- the command


def main() -> int:
    parser = argparse.ArgumentParser(description="Random schedules of faults in a simulated world.")
    parser.add_argument("--seed", type=int, help="one schedule, with its timeline")
    parser.add_argument("--minutes", type=float, default=10.0, help="fresh ones for so long, on all processors")
    parser.add_argument("--from", type=int, dest="first", default=random.SystemRandom().randrange(1 << 32), metavar="N")
    options = parser.parse_args()
    if options.seed is not None:
        logging.basicConfig(format="                    %(message)s", stream=sys.stdout)
        wrong = storm(options.seed).wrong
        print("\n".join(wrong) or "nothing is wrong")
        return bool(wrong)
    print(f"from seed {options.first}")
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        seeds = range(options.first, options.first + workers)
        found = [*pool.map(hunt, seeds, [workers] * workers, [60 * options.minutes] * workers)]
    schedules, hours = sum(each.schedules for each in found), sum(each.seconds for each in found) / 3600
    failed = sorted(seed for each in found for seed in each.failed)
    print(f"{schedules} schedules, {hours:.1f} simulated hours in {options.minutes:g} minutes; failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    VERBOSE = "--seed" in str(sys.argv)
    sys.exit(main())
