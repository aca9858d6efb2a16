#!/usr/bin/env python3
"""Chaos: real agents, an ensemble of three, a client, and random faults from a seed, one to three at a time.

A run goes in rounds. In each round some faults begin, last and end, then everything is mended and must be as it was.
One observer sees each round: who binds, who answers the client. The same seed gives the same rounds; what they do to
the hosts ("the holder", "the second in the queue") depends on who that is then. A host is *fit* while its agent runs,
nothing was done to its cable or interface, its checks pass, and with at-most-one it reaches ZooKeeper. The bounds:

  away    no answer for the client, while one host was fit all that time
  two     an IP bound by two hosts, both fit all that time (with at-most-one: by two hosts at all)
  again   once all faults have ended, until each IP is bound by exactly one host, for good
  leaks   memory, threads and descriptors of the agent on the last host, which is never ended

It ends in one line; exit code 1 where a bound was exceeded or something else was wrong (an agent that ended by itself,
a traceback, an exit code, no agreement in the end): then there is a picture and the logs of each such round.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lab
import scenarios
import timeline
from lab import Host, Lab, Observer, Result, Service, Span, run, wait_until
from scenarios import CHECKED, Cluster, next_version, now, pause, together


class Bounds(NamedTuple):
    """In s. `away`: a session, a tick of ZooKeeper's, and what a start takes."""

    away: float
    two: float
    again: float


BOUNDS = {"at-least-one": Bounds(6, 2, 3), "at-most-one": Bounds(6, 0.001, 6)}  # 1 ms: the order of the events
MEMORY, THREADS, DESCRIPTORS = 1.25, 2, 4  # times the memory, and how many more, than after the first rounds
WARM_UP = 5  # rounds, before the memory counts
EVERY = 0.01  # s between the client's questions
CONFIG = {"session_timeout": 4, "health_check_timeout": 1, "health_check_fall": 2, "witnesses": ["10.77.0.200"]}
DISK = 1 << 20  # bytes of a state directory
ANSWERS = {204, 201, 404, 409, 503, 504}  # what an order may be answered while everything is in trouble

# --------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Event:
    """One fault of a round: `rank` is the victim's place in the queue, 0 the holder; `seed` is for its details."""

    fault: str
    at: float
    lasts: float
    rank: int
    seed: int


def signalled(c: Cluster, host: Host, lasts: float, dice: random.Random, sig: int) -> None:
    """SIGSTOP, then SIGCONT; or the end of the process and its start."""
    host.kill(sig)
    pause(lasts)
    host.kill(signal.SIGCONT) if sig == signal.SIGSTOP else c.start(host)


def stopped(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """SIGTERM, which ends in exit code 0 within 11 s."""
    code, took = host.stop(timeout=30)
    assert (code, took < 11) == (0, True), f"{host.name}: exit code {code} after {took:.1f} s"
    pause(lasts)
    c.start(host)


def reloaded(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """SIGHUP with a new version, which must say so."""
    version = next_version(c)
    host.kill(signal.SIGHUP)
    wait_until(lambda: (answer(host, "/version") or {}).get("version") == version, 20, f"{host.name}: {version}")
    pause(lasts)


def died(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The host dies and boots."""
    host.power_off()
    pause(lasts)
    host.mend()
    c.start(host)


def cut(c: Cluster, host: Host, lasts: float, dice: random.Random, how: str) -> None:
    """One of Host's faults of cable and switch."""
    getattr(host, how)()
    pause(lasts)
    host.mend()


def bad_cable(c: Cluster, host: Host, lasts: float, dice: random.Random, most: float) -> None:
    """Frames are lost, or late by up to 15 ms."""
    host.worsen(dice.uniform(0, most), dice.uniform(0.001, 0.01), dice.uniform(0, 0.005))
    pause(lasts)
    host.mend()


def down_and_up(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The interface."""
    host.ip(f"link set {host.interface} down")
    pause(lasts)
    host.ip(f"link set {host.interface} up")
    with contextlib.suppress(RuntimeError):  # it has kept it
        host.add_address(f"{host.address6}/64")


def made_anew(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The interface goes, and comes back as another one."""
    host.ip(f"link del {host.interface}")
    pause(lasts)
    c.rewire(host)


def deleted_addresses(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """Somebody removes virtual IPs by hand, again and again."""
    for _ in spells(lasts, dice):
        for address in set(host.strange()) & {f"{vip}/{128 if ':' in vip else 32}" for vip in c.vips}:
            with contextlib.suppress(RuntimeError):  # it is gone by itself
                host.del_address(address)


def flapping_check(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The service behind the first IP comes and goes."""
    for number in spells(lasts, dice):
        c.services[host].start() if number % 2 else c.services[host].stop()
    c.services[host].stop()
    c.services[host].start()


def orders(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """Somebody orders IPs to and fro."""
    for _ in spells(lasts, dice):
        order(host, "POST", f"/ips/{dice.choice(c.vips)}/{dice.choice(('lock', 'failover'))}")


def deleted_and_added(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The host no longer shares the last IP, for a while."""
    order(host, "DELETE", f"/ips/{c.vips[-1]}")
    pause(lasts)
    wait_until(lambda: order(host, "POST", "/ips", {"ip": c.vips[-1]}) in {201, 409}, 10, f"{host.name}: added again")


def full_disk(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """No byte is left for the state; what cannot be kept is not promised."""
    filler, vip = host.directory / "state" / "filler", c.fresh()
    with filler.open("wb", 0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    status = order(host, "POST", "/ips", {"ip": vip})  # the last page of a file may have room for it
    kept = [file for file in filler.parent.glob("ips.*") if f'"{vip}' in file.read_text()]
    pause(lasts)
    filler.unlink()
    assert status in {0, 503} or kept, f"{host.name}: {vip} was taken, with {status}, and is not kept"
    if status == 201:
        order(host, "DELETE", f"/ips/{vip}")


def stepped_clock(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The time of day is up to an hour early or late; and back."""
    clock(host).write_text(f"{dice.choice((-1, 1)) * dice.randrange(60, 3600)}")
    pause(lasts)
    clock(host).write_text("0")


def servers_gone(c: Cluster, host: Host, lasts: float, dice: random.Random, how: str, count: int) -> None:
    """So many servers of the ensemble are killed ("stop") or hang ("pause")."""
    getattr(c.zk, how)(*dice.sample(range(3), count))
    pause(lasts)
    c.zk.start()


def black_hole(c: Cluster, host: Host, lasts: float, dice: random.Random) -> None:
    """The ensemble's cable is pulled: connections stay open, nothing is answered."""
    lab.ip(c.lab.switch, "link set pzk down")
    pause(lasts)
    lab.ip(c.lab.switch, "link set pzk up")


def spells(lasts: float, dice: random.Random) -> Iterator[int]:
    """Number random spells until the time is over."""
    until = now() + lasts
    for number in itertools.count():
        yield number
        pause(min(dice.uniform(0.05, 1.5), max(0.0, until - now())))
        if now() >= until:
            return


def answer(host: Host, path: str) -> dict[str, object] | None:
    """What the agent's API says, None where it says nothing."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return dict(host.api("GET", path, timeout=2)[1])
    return None


def order(host: Host, method: str, path: str, body: object = None) -> int:
    """The status of an order, 0 where nobody answers; AssertionError if the API never should say that."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        status, said = host.api(method, path, body, timeout=15)
        assert status in ANSWERS, f"{host.name}: {method} {path}: {status} {said}"
        return status
    return 0


def clock(host: Host) -> Path:
    """The file that says by how many seconds the host's time of day is wrong."""
    return host.directory / "clock"


# The machine has one clock, and a time namespace can shift only the monotonic ones. So the agent's interpreter imports
# this first: whatever asks it for the time of day is told another one.
SITECUSTOMIZE = """
import datetime, time
def wrong():
    with open({clock!r}) as file:
        return int(file.read() or 0)
class Stepped(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=wrong())
datetime.datetime, real = Stepped, time.time
time.time = lambda: real() + wrong()
"""


@dataclass(frozen=True)
class Kind:
    """A kind of fault; `unfit`: the host need not serve meanwhile (the IPs at these places, or all).

    `ends`: its agent's process ends, or is a new one.
    """

    act: Callable[[Cluster, Host, float, random.Random], None]
    unfit: slice | None = None
    ends: bool = False


ALL = slice(None)
CUT = "cut from ZooKeeper"
OF_HOSTS = {
    "SIGSTOP": Kind(partial(signalled, sig=signal.SIGSTOP), ALL),
    "SIGKILL": Kind(partial(signalled, sig=signal.SIGKILL), ALL, ends=True),
    "SIGTERM": Kind(stopped, ALL, ends=True),
    "SIGHUP": Kind(reloaded, ends=True),
    "host dies": Kind(died, ALL, ends=True),
    **{how: Kind(partial(cut, how=how), ALL) for how in ("unplug", "isolate", "deafen", "mute")},
    CUT: Kind(partial(cut, how="cut_zookeeper")),
    "bad cable": Kind(partial(bad_cable, most=0.2)),
    "down and up": Kind(down_and_up, ALL),
    "made anew": Kind(made_anew, ALL),
    "addresses deleted": Kind(deleted_addresses),
    "check flaps": Kind(flapping_check, slice(0, 1)),
    "orders": Kind(orders),
    "DELETE and POST": Kind(deleted_and_added, slice(-1, None)),
    "disk full": Kind(full_disk),
    "clock steps": Kind(stepped_clock),
}
OF_ZOOKEEPER = {
    **{f"{count} killed": Kind(partial(servers_gone, how="stop", count=count)) for count in (1, 2, 3)},
    **{f"{count} hung": Kind(partial(servers_gone, how="pause", count=count)) for count in (1, 2, 3)},
    "black-holed": Kind(black_hole),
}


def ends(event: Event) -> bool:
    """Whether it ends an agent's process."""
    return event.fault in OF_HOSTS and OF_HOSTS[event.fault].ends


def rounds(seed: int, hosts: int) -> Iterator[list[Event]]:
    """The schedule, without an end: one to three faults a round, on different hosts, one of them on ZooKeeper's."""
    dice = random.Random(seed)
    while True:
        ranks = dice.sample(range(hosts), min(hosts, dice.choice((1, 1, 2, 2, 3))))
        if 0 not in ranks and dice.random() < 0.5:
            ranks[0] = 0  # it is the holder whom most faults should befall
        with_zookeeper, events = dice.random() < 0.35, list[Event]()
        for rank in ranks:
            kinds = OF_ZOOKEEPER if with_zookeeper and rank == ranks[-1] else OF_HOSTS
            if sum(ends(event) for event in events) == hosts - 1:  # one agent is spared
                kinds = {name: kind for name, kind in kinds.items() if not kind.ends}
            lasts = round(0.2 * 40 ** dice.random(), 2)  # 0.2 to 8 s, short ones as often as long ones
            events.append(Event(dice.choice([*kinds]), round(dice.uniform(0, 3), 2), lasts, rank, dice.getrandbits(32)))
        yield events


def victims(events: Iterable[Event], queue: list[Host], spared: Host) -> list[tuple[Event, Host]]:
    """Each fault's host: the one at its place, or where that is taken (or spared, and its agent would end) the next."""
    pairs = list[tuple[Event, Host]]()
    for event in sorted(events, key=ends, reverse=True):
        taken = [host for other, host in pairs if other.fault in OF_HOSTS] if event.fault in OF_HOSTS else []
        free = [host for host in queue[event.rank :] + queue if not (ends(event) and host is spared)]
        pairs.append((event, next(host for host in free if host not in taken)))
    return pairs


# ------------------------------------------------------------------------------------------------------ the bounds


def common(one: Iterable[Span], other: Iterable[Span]) -> list[Span]:
    """What two lists of spans have in common."""
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return sorted((a, b) for a, b in both if a < b)


def without(spans: Iterable[Span], since: float, until: float) -> list[Span]:
    """What is left of a time without these spans."""
    edges = [since, *(edge for span in lab.merge(spans) for edge in span), until]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def longest(spans: Iterable[Span]) -> float:
    return max((b - a for a, b in spans), default=0.0)


@dataclass
class Round:
    """What was done, what was seen, what was wrong."""

    number: int
    promise: str
    done: list[tuple[str, str, float, float]] = field(default_factory=list)  # to whom, what, since and until when
    unfit: dict[str, dict[str, list[Span]]] = field(default_factory=dict)  # IP, host, when
    healed: float = 0.0  # when all faults had ended and all agents answered
    settled: bool = False  # all agents say so
    away: float = 0.0
    two: float = 0.0
    again: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def bounds(self) -> Bounds:
        return BOUNDS[self.promise]

    def judge(self, result: Result) -> None:
        """Hold it against the bounds."""
        for vip in result.vips:
            one = result.of(vip)
            outages, bound = lab.merge(one.outages, 2 * EVERY), one.bound()
            fit = {host: without(self.unfit[vip][host], one.began, one.ended) for host in bound}
            away = max(longest(common(outages, spans)) for spans in fit.values())
            serving = [common(bound[host], fit[host]) for host in bound]
            two = max(longest(common(a, b)) for a, b in itertools.combinations(serving, 2))
            two = two if self.promise == "at-least-one" else one.longest(2, 99, on_lan=False)
            again = scenarios.one_after(one, self.healed) if self.healed else scenarios.NEVER
            for name, value, bar in zip(("away", "two", "one again"), (away, two, again), self.bounds, strict=True):
                if value > bar:
                    self.wrong.append(f"{vip} {name} {value:.2f} s (bound {bar:g})")
            self.away, self.two, self.again = max(self.away, away), max(self.two, two), max(self.again, again)

    def picture(self, result: Result) -> str:
        """The timeline: the faults, who bound each IP, who answered for it."""
        hosts = [*result.bound()]
        colour = dict(zip(hosts, timeline.HOSTS, strict=False))
        bars = {who: [(a, b, timeline.FAULT, what) for whom, what, a, b in self.done if whom == who]
                for who in ["ZooKeeper", *hosts]}  # fmt: skip
        lanes = [timeline.Lane(who, bar) for who, bar in bars.items()]
        lanes[0].title = f"Round {self.number}: " + ("; ".join(self.wrong) or "as it should be")
        for vip in result.vips:
            one = result.of(vip)
            turns = [(a, b, colour[host], host) for host, a, b in one.holders]
            gone = [(a, b, timeline.AWAY, "away") for a, b in lab.merge(one.outages, 2 * EVERY)]
            lanes.append(timeline.Lane("answers the client", turns + gone, vip))
            for host, spans in one.bound().items():
                lanes.append(timeline.Lane(f"bound by {host}", [(a, b, colour[host], "") for a, b in spans]))
        return timeline.picture(lanes, result.began, result.ended, [(self.healed, "all ended")] if self.healed else ())


# --------------------------------------------------------------------------------------------------------- the run


def use(host: Host) -> tuple[float, int, int]:
    """Memory in MB, threads and descriptors of its agent."""
    assert host.agent
    process = Path(f"/proc/{host.agent.pid}")
    values = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", (process / "status").read_text(), re.M))
    return int(values["VmRSS"]) / 1000, int(values["Threads"]), len([*(process / "fd").iterdir()])


class Chaos:
    """A cluster under fire."""

    def __init__(self, cluster: Cluster, promise: str, directory: Path) -> None:
        self.c, self.promise, self.directory = cluster, promise, directory
        self.spared = cluster.hosts[-1]  # its agent's process lives all the time
        self.rounds: list[Round] = []
        self.uses: list[tuple[float, int, int]] = []

    def prepare(self) -> None:
        """Small disks, clocks that can be set, three IPs: one with a check, one of IPv6, one of neither."""
        for host in self.c.hosts:
            state = host.directory / "state"
            state.mkdir(exist_ok=True)
            run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(state))
            self.c.lab.at_end.callback(run, "umount", "-l", str(state))
            clock(host).write_text("0")
            python = host.directory / "python"
            python.mkdir()
            (python / "sitecustomize.py").write_text(SITECUSTOMIZE.format(clock=str(clock(host))))
            host.environment = {"PYTHONPATH": str(python)}
        self.c.reset(3, {**CONFIG, "promise": self.promise})
        self.c.services = {host: Service(host) for host in self.c.hosts}
        self.c.vips = [self.c.add(**CHECKED), self.c.add(vip=self.c.fresh(6)), self.c.add()]
        for vip in self.c.vips:
            self.c.settled(vip, 30)
        self.uses.append(use(self.spared))

    def round(self, events: list[Event]) -> Round:
        """Do all that, mend it, and judge what was seen."""
        c, r = self.c, Round(len(self.rounds) + 1, self.promise)
        r.unfit = {vip: {host.name: [] for host in c.hosts} for vip in c.vips}
        holder, others = c.settled(c.vips[0], 30)
        pairs = victims(events, [holder, *others], self.spared)
        c.mark()
        for service in c.services.values():  # nobody accepts: after 1024 checks its queue would be full
            service.stop()
            service.start()
        with Observer(c.lab, c.vips, EVERY) as observer:
            pause(0.2)
            together(*(partial(self._befall, r, event, host) for event, host in pairs))
            try:
                c.mend()
                wait_until(lambda: all(answer(host, "/health") for host in c.hosts), 20, "all agents answer")
                r.healed = now()
                c.all_serve(20)
                for vip in c.vips:
                    c.settled(vip, 20)
                r.settled = True
            except (AssertionError, RuntimeError, OSError) as error:
                r.wrong.append(f"not mended: {error}")
            pause(max(0.5, r.healed + r.bounds.again + 0.5 - now()))
        r.judge(observer.result)
        for host in c.hosts:
            if not host.alive:
                r.wrong.append(f"{host.name}: its agent has ended by itself")
            r.wrong += [f"{host.name}: a traceback in its log"] * ("Traceback" in c.news(host))
        if r.wrong:
            self.keep(r, observer.result)
        return r

    def _befall(self, r: Round, event: Event, host: Host) -> None:
        pause(event.at)
        kind, began = OF_HOSTS.get(event.fault) or OF_ZOOKEEPER[event.fault], now()
        everybody, strict = event.fault in OF_ZOOKEEPER, self.promise == "at-most-one"
        vips = self.c.vips[ALL if strict and (everybody or event.fault == CUT) else kind.unfit or slice(0)]
        spans = [r.unfit[vip][each.name] for vip in vips for each in (self.c.hosts if everybody else [host])]
        for span in spans:
            span.append((began, scenarios.NEVER))
        try:
            kind.act(self.c, host, event.lasts, random.Random(event.seed))
            if event.fault in OF_HOSTS:
                wait_until(lambda: answer(host, "/health"), 20, f"{host.name} answers again")
            if kind.unfit == OF_HOSTS["check flaps"].unfit:
                wait_until(lambda: self.c.status(host, self.c.vips[0]) != "FAILING", 10, f"{host.name}: checks pass")
        except (AssertionError, RuntimeError, OSError) as error:
            r.wrong.append(f"{event.fault}: {error}")
        for span in spans:
            span[span.index((began, scenarios.NEVER))] = (began, now())
        r.done.append((host.name if event.fault in OF_HOSTS else "ZooKeeper", event.fault, began, now()))

    def keep(self, r: Round, result: Result) -> None:
        """The picture and the logs of a round."""
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"round-{r.number}"
        (self.directory / f"{name}.svg").write_text(r.picture(result))
        for host in self.c.hosts:
            (self.directory / f"{name}-{host.name}.log").write_text(self.c.news(host))
        (self.directory / f"{name}.json").write_text(json.dumps([r.wrong, r.done], indent=1))

    def run(self, schedule: Iterator[list[Event]], seconds: float) -> None:
        """Round after round until the time is over."""
        until = now() + seconds
        while not self.rounds or now() < until:
            events = next(schedule)
            try:
                r = self.round(events)
            except (AssertionError, RuntimeError, OSError) as error:
                r = Round(len(self.rounds) + 1, self.promise, wrong=[f"could not be done: {error}"])
            self.rounds.append(r)
            if self.spared.alive:
                self.uses.append(use(self.spared))
            what = "; ".join(f"{whom}: {what} {b - a:.1f} s" for whom, what, a, b in r.done)
            seen = f"away {r.away:.2f}, two {r.two:.2f}, again {r.again:.2f}"
            print(f"{time.strftime('%H:%M:%S')} {r.number}: {what}: {seen}", *r.wrong, sep="; ", file=sys.stderr)
            if not r.settled:
                return  # what comes now would only say so again

    def verdict(self) -> tuple[bool, str]:
        """Whether all was well, and the line."""
        first, last = self.uses[min(WARM_UP, len(self.uses) - 1)], self.uses[-1]
        leaks = [name for name, limit, before, after in (
            ("memory", MEMORY * first[0], first[0], last[0]), ("threads", first[1] + THREADS, first[1], last[1]),
            ("descriptors", first[2] + DESCRIPTORS, first[2], last[2])) if after > limit]  # fmt: skip
        wrong = [r for r in self.rounds if r.wrong]
        away, two, again = (max(getattr(r, name) for r in self.rounds) for name in ("away", "two", "again"))
        faults = sum(len(r.done) for r in self.rounds)
        end = "as it should be" if not self.rounds[-1].wrong else "; ".join(self.rounds[-1].wrong)
        bounds = BOUNDS[self.promise]
        line = (
            f"{self.promise}, {faults} faults in {len(self.rounds)} rounds on {len(self.c.hosts)} hosts; "
            f"longest away {away:.2f} s (bound {bounds.away:g}), longest two {two:.2f} s (bound {bounds.two:g}), "
            f"one again after {again:.2f} s (bound {bounds.again:g}); in the end {end}; "
            f"memory {first[0]:.1f} -> {last[0]:.1f} MB (bound {MEMORY * first[0]:.1f}), "
            f"threads {first[1]} -> {last[1]} (bound {first[1] + THREADS}), "
            f"descriptors {first[2]} -> {last[2]} (bound {first[2] + DESCRIPTORS})"
        )
        if wrong or leaks:
            line += f"; WRONG: {', '.join([f'round {r.number}' for r in wrong] + leaks)}, see {self.directory}"
        return not wrong and not leaks, line


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--minutes", type=float, default=10, metavar="N", help="how long (10)")
    option("--seed", type=int, metavar="S", help="the schedule's; without it a new one")
    option("--hosts", type=int, choices=(3, 4, 5), help="how many; without it the seed says")
    option("--promise", choices=[*BOUNDS], default="at-least-one", help="what the agents are told (at-least-one)")
    option("--list", type=int, metavar="N", help="print the first N rounds of the schedule only")
    option("--keep", type=Path, metavar="DIRECTORY", help="for pictures and logs of rounds that went wrong")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    hosts = options.hosts or 3 + seed % 3
    schedule = rounds(seed, hosts)
    print(f"seed {seed}, {hosts} hosts", file=sys.stderr, flush=True)
    if options.list:
        for events in itertools.islice(schedule, options.list):
            print("; ".join(f"{e.fault} at {e.at} s for {e.lasts} s, place {e.rank}" for e in events))
        return 0
    with Lab(hosts) as world:
        directory = options.keep or Path(tempfile.gettempdir(), f"link-chaos-{seed}")
        chaos = Chaos(Cluster(world), options.promise, directory)
        chaos.prepare()
        with contextlib.suppress(KeyboardInterrupt):
            chaos.run(schedule, 60 * options.minutes)
        if not chaos.rounds:
            return 1
        well, line = chaos.verdict()
    print(f"seed {seed}: {line}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
