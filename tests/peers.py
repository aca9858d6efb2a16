"""LinK beside its peers, for `bench.py --peers`: keepalived and ucarp of Debian's packages, and LinK, with their
defaults but for what a column says, through the same scenarios, with the same client and observer.

Each contender has a lab of its own with three hosts. All go through a scenario at the same time, but each does what is
to be done 0.4 s after the one before it, so that every run of a peer has one of LinK beside it. With many IPs
one contender after the other is measured. The table and the picture go into the README.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import platform
import random
import re
import signal
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lab
import timeline
from lab import Host, Lab, Observer, Result, run, wait_until
from scenarios import NEVER, Cluster, Measured, Procedure, Row, fault, idle, kill, now, pause, together, trial, unplug

README, PICTURE = lab.PROGRAM.with_name("README.md"), lab.PROGRAM.parent / "docs" / "peers.svg"
BEGIN, END = "<!-- written by ./start.sh bench --peers -->", "<!-- until here -->"
APART = 0.4  # s between two contenders
OVER = 0.2  # s before the end of what was looked at: who was not back then was not back

# ------------------------------------------------------------------------------------------------------ contenders


class Ours(Cluster):
    """LinK."""

    label, words = "LinK", "LinK"

    def __init__(self, world: Lab) -> None:
        super().__init__(world, quick=False, shorter=2)

    def move(self, host: Host) -> None:
        """Let another host have it."""
        status, said = host.api("POST", f"/ips/{self.vips[0]}/failover", timeout=15)
        assert status == 204, said


class Peer(Cluster):
    """What its peers have in common: no ZooKeeper, no API, an order of the hosts; the first one has the IPs at first.

    `reset`, `settled` and `start` are what the scenarios use of a Cluster.
    """

    label = words = ""

    def __init__(self, world: Lab) -> None:
        super().__init__(world, quick=False, shorter=2)

    def prepare(self, row: Row, families: str) -> None:
        self.mend()
        for host in self.hosts:
            if host.alive:
                with contextlib.suppress(Exception):  # a thousand addresses go faster if it removes them
                    host.stop(timeout=5)
            self._clear(host)
        self.vips = [f"10.99.{n // 250}.{n % 250 + 1}" for n in range(row.ips)] if row.ips > 1 else [self.fresh()]
        for host in self.hosts:
            self.start(host)
        wait_until(lambda: set(self.vips) <= self.hosts[0].bound(), 30, f"{self.label}: the first host has all")
        wait_until(lambda: self.bound(self.vips[0]) == self.hosts[:1], 10, f"{self.label}: it alone has them")
        pause(random.uniform(1.5, 2))
        self.mark()

    def settled(self, vip: str, timeout: float = 6.0, among: Any = ()) -> tuple[Host, list[Host]]:
        def one() -> list[Host]:
            found = [host for host in self.bound(vip) if host.on]
            return found if len(found) == 1 else []

        holder = wait_until(one, timeout, f"{vip}: one host")[0]
        return holder, [host for host in self.hosts if host is not holder]

    def start(self, host: Host, **config: Any) -> None:
        command = self.command(host)
        host.agent = self.lab.spawn(["ip", "netns", "exec", host.namespace, *command], host.log_path)

    def command(self, host: Host) -> list[str]:
        raise NotImplementedError

    def move(self, host: Host) -> None:
        raise NotImplementedError


class Keepalived(Peer):
    """One VRRP instance: all BACKUP at first, by priority; IPs after the first are not in its packets."""

    def __init__(self, world: Lab, every: float) -> None:
        super().__init__(world)
        self.every, self.label = every, "keepalived" + (f" {every:g}" if every != 1 else "")
        self.words = "keepalived, " + ("defaults" if every == 1 else f"`advert_int {every:g}`")

    def configure(self, host: Host, priority: int) -> Path:
        excluded = "\n".join(f"{vip}/32 dev {host.interface}" for vip in self.vips[1:])
        path = host.directory / "keepalived.conf"
        path.write_text(f"""
            global_defs {{
                vrrp_version {2 if self.every == 1 else 3}  # 2 has whole seconds only
            }}
            vrrp_instance link {{
                state BACKUP
                interface {host.interface}
                virtual_router_id 51
                priority {priority}
                advert_int {self.every:g}
                virtual_ipaddress {{
                    {self.vips[0]}/32 dev {host.interface}
                }}
                {"virtual_ipaddress_excluded {" if excluded else ""}
                {excluded}
                {"}" if excluded else ""}
            }}""")
        return path

    def command(self, host: Host) -> list[str]:
        path, pid = self.configure(host, 200 - 50 * host.number), host.directory / "pid"
        for file in host.directory.glob("pid*"):
            file.unlink()  # of one that was killed: it may be a zombie still, and must not count as running
        return ["keepalived", "-n", "-l", "-P", "-f", str(path), "-p", str(pid), "-r", f"{pid}-vrrp"]

    def move(self, host: Host) -> None:
        """A lower priority, and a reload: the way without a gap."""
        self.configure(host, 10)
        host.kill(signal.SIGHUP)


class Ucarp(Peer):
    """One process per IP, with scripts that add and remove it."""

    label = words = "ucarp"

    def command(self, host: Host) -> list[str]:
        for what in "add", "del":
            script = host.directory / what
            script.write_text(f'#!/bin/sh\nip addr {what} "$2/32" dev "$1"\n')
            script.chmod(0o755)
        scripts = [f"--upscript={host.directory}/add", f"--downscript={host.directory}/del", "--shutdown"]
        own = [f"--interface={host.interface}", f"--srcip={host.address}", f"--advskew={20 * (host.number - 1)}"]
        return ["ucarp", *own, "--vhid=51", "--pass=link", f"--addr={self.vips[0]}", *scripts]

    def move(self, host: Host) -> None:
        host.kill(signal.SIGUSR2)


CONTENDERS: tuple[Callable[[Lab], Any], ...] = (
    Ours, partial(Keepalived, every=1), partial(Keepalived, every=0.1), partial(Keepalived, every=0.01), Ucarp,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------- the scenarios


@dataclass(frozen=True)
class Line:
    """A row of the table: what it says, which figure that is, and how long was looked at most (s)."""

    words: str
    figure: str
    looked: float = NEVER


@dataclass(frozen=True)
class Compared:
    """A scenario, its rows in the table, who does not go through it, and how often the others do at --runs 4."""

    name: str
    procedure: Procedure
    lines: tuple[Line, ...]
    without: frozenset[str] = frozenset()
    times: int = 4
    ips: int = 1

    @property
    def row(self) -> Row:
        """As Cluster's `prepare` wants it."""
        return Row(self.name, self.procedure, (), ips=self.ips)


def move(c: Any, host: Host) -> None:
    """An operator wants it elsewhere."""
    c.move(host)


def lose_zookeeper_then_the_host(c: Cluster, host: Host) -> Measured:
    """The host dies after every session."""
    c.zk.stop()
    pause(5)
    died = now()
    host.power_off()
    return {"at": died}


MEANWHILE, HEALED = "away until the end", "gap after the end"
PEERS = frozenset(("keepalived", "keepalived 0.1", "keepalived 0.01", "ucarp"))
COMPARED = (
    Compared("host death", trial(kill, hold=5, rest=0.5), (Line("host death: away", MEANWHILE, 5),)),
    Compared("cable", trial(unplug, hold=5, rest=0.5), (Line("cable pulled: away", MEANWHILE, 5),)),
    Compared(
        "partition",
        trial(fault("isolate"), hold=5, rest=8),
        (
            Line("silent partition (its carrier stays): away", MEANWHILE, 5),
            Line("silent partition, healed: away", HEALED, 8),
            Line("silent partition, healed: two hosts have it", "two after the end", 8),
        ),
    ),
    Compared(
        "move",
        trial(move, hold=5, rest=0.5),
        (
            Line("planned move: away", "away", 5.5),
            Line("planned move: from the order until another host has it", "new holder"),
        ),
    ),
    Compared("stop", trial(fault("SIGTERM"), hold=5, rest=0.5), (Line("stop (SIGTERM): away", "away", 5.5),)),
    Compared(
        "crash",
        trial(fault("SIGKILL"), hold=0.1, rest=5),
        (Line("crash (SIGKILL), started again after 0.1 s: away", "away", 5),),
    ),
    Compared(
        "ZooKeeper",
        trial(lose_zookeeper_then_the_host, hold=4, rest=0.5),
        (
            Line("ZooKeeper away for 5 s: away", "away before"),
            Line("ZooKeeper away, then host death: away", MEANWHILE, 4),
        ),
        without=PEERS,
    ),
    Compared(
        "100 IPs",
        trial(kill, hold=6, rest=0, interval=0.02),
        (Line("host death, 100 IPs: until all answer", "all answering"),),
        without=frozenset({"ucarp"}),
        times=2,
        ips=100,
    ),
    Compared(
        "1000 IPs",
        trial(kill, hold=8, rest=0, interval=0.02),
        (Line("host death, 1,000 IPs: until all answer", "all answering"),),
        without=frozenset({"keepalived 0.01", "ucarp"}),
        times=1,
        ips=1000,
    ),
    Compared(
        "at rest",
        idle,
        (
            Line("at rest: the holder's CPU, seconds a minute", "holder CPU"),
            Line("at rest: the holder's memory, MB", "holder RSS"),
            Line("at rest: packets that the holder sends a second", "holder sent"),
            Line("at rest: a standby's CPU, seconds a minute", "standby CPU"),
        ),
        times=1,
    ),
)

# --------------------------------------------------------------------------------------------------------- the run


@dataclass
class Arena:
    """The contenders, and what they have done so far: (scenario, contender) to its runs."""

    clusters: list[Any]
    runs: dict[tuple[str, str], list[Measured]]
    failed: list[str]

    def compare(self, compared: Compared) -> None:
        """All that go through this scenario do so once."""
        clusters = [c for c in self.clusters if c.label not in compared.without]
        if compared.ips > 1:
            for c in clusters:
                self._one(compared, c, 0, threading.Barrier(1))
        else:
            gate = threading.Barrier(len(clusters))
            together(*(partial(self._one, compared, c, number, gate) for number, c in enumerate(clusters)))

    def _one(self, compared: Compared, c: Any, number: int, gate: threading.Barrier) -> None:
        try:
            try:
                c.prepare(compared.row, "4")
            finally:
                gate.wait()
            pause(APART * number)
            measured = compared.procedure(c)
        except (AssertionError, RuntimeError, OSError, LookupError) as error:
            self.failed.append(f"{compared.name}, {c.label}: {type(error).__name__}: {error}")
            print(self.failed[-1], file=sys.stderr, flush=True)
            return
        self.runs.setdefault((compared.name, c.label), []).append(measured)
        shown = ", ".join(f"{line.figure} {measured[line.figure]:.3f}" for line in compared.lines)
        print(f"{time.strftime('%H:%M:%S')} {compared.name}, {c.label}: {shown}", file=sys.stderr, flush=True)

    def table(self) -> list[str]:
        """The table in markdown; what a peer is better at stands below it."""
        better: list[str] = []
        lines = [
            f"| median (worst), seconds where nothing else is said | {' | '.join(c.words for c in self.clusters)} |"
        ]
        lines.append("|---" * (len(self.clusters) + 1) + "|")
        for compared in COMPARED:
            for line in compared.lines:
                values = {
                    c.label: [min(run[line.figure], line.looked) for run in self.runs.get((compared.name, c.label), [])]
                    for c in self.clusters
                }
                medians = {label: statistics.median(found) for label, found in values.items() if found}
                good = min([*medians.values(), NEVER]) * 1.1 + 0.005  # as good as the best
                best = {label for label, median in medians.items() if median <= min(good, line.looked - OVER) < NEVER}
                cells = [
                    cell(values[c.label], line, c.label in best) if values[c.label] else "-" for c in self.clusters
                ]
                lines.append(f"| {line.words} | {' | '.join(cells)} |")
                if medians and self.clusters[0].label not in best:
                    better.append(f"{line.words} ({', '.join(sorted(best))})")
        said = f"**Bold**: the best of its row. A peer is better at: {'; '.join(better) or 'nothing here'}."
        return [*lines, "", *textwrap.wrap(said, 150)]

    def story(self) -> str:
        """The picture: LinK and keepalived with its defaults through a planned move and a host death."""
        gate, pair = threading.Barrier(2), self.clusters[:2]

        def tell(c: Any) -> tuple[Result, float, float]:
            c.prepare(Row("story", idle, ()), "4")
            holder, _ = c.roles()
            gate.wait()
            began = now()
            with Observer(c.lab, c.vips) as observer:
                pause(began + 2 - now())
                ordered = now()
                c.move(holder)
                pause(began + 7 - now())
                holder, _ = c.settled(c.vips[0])
                pause(began + 8 - now())
                died = now()
                holder.power_off()
                pause(began + 13 - now())
            return observer.result, ordered, died

        lanes, told = [], together(*(partial(tell, c) for c in pair))
        for c, (result, _, _) in zip(pair, told, strict=True):
            numbers = {host.name: number for number, host in enumerate(c.hosts)}
            turns = [(a, b, timeline.HOSTS[numbers[host]], host) for host, a, b in result.holders]
            gone = [(a, b, timeline.AWAY, "nobody") for a, b in result.outages]
            lanes.append(timeline.Lane("answers the client", turns + gone, c.words.replace("`", "")))
            for host, spans in result.bound(on_lan=True).items():
                bars = [(a, b, timeline.HOSTS[numbers[host]], "") for a, b in spans]
                lanes.append(timeline.Lane(f"{host} has the IP", bars))
        since = max(result.began for result, _, _ in told)
        events = [(told[0][1], "another host is to have it"), (told[0][2], "the host that has it dies")]
        return timeline.picture(lanes, since, min(result.ended for result, _, _ in told), events)


def cell(values: Sequence[float], line: Line, best: bool) -> str:
    """Median (worst); what was not over when nobody looked any more is "more than"."""

    def show(value: float) -> str:
        if value == NEVER:
            return "never"
        if value > line.looked - OVER:
            return f"> {line.looked:g}"
        return f"{value:.3g}" if value >= 10 else f"{value:.2f}"

    median = show(statistics.median(values))
    text = f"**{median}**" if best else median
    return f"{text} ({show(max(values))})" if len(values) > 1 else text


def caption(runs: int, load: float) -> str:
    """When, where, what, how often, and how busy the machine was before."""
    packages = ("keepalived", "ucarp", "zookeeper")
    versions = dict(
        line.split() for line in run("dpkg-query", "-Wf", "${Package} ${Version}\n", *packages).splitlines()
    )
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    ours = re.search(r'^VERSION = "(.*)"', lab.PROGRAM.read_text(), re.M)
    assert ours
    many = ", ".join(f"{c.name} {max(1, round(c.times * runs / 4))}" for c in COMPARED if c.times != 4)
    machine = f"{os.cpu_count()} cores of {model[1] if model else 'a processor'}, Linux {platform.release()}"
    return (
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {machine}; LinK {ours[1]} on Python {platform.python_version()} "
        f"with ZooKeeper {versions['zookeeper']}, keepalived {versions['keepalived']}, ucarp {versions['ucarp']}; "
        f"{runs} runs ({many}); load before: {load:.1f}."
    )


def main(runs: int, only: Sequence[str] = ("*",)) -> int:
    """Compare, print the table, and if it is whole write it and the picture; exit code 1 where a run failed."""
    began, load, whole = now(), os.getloadavg()[0], list(only) == ["*"]
    some = [compared for compared in COMPARED if any(fnmatch.fnmatch(compared.name, pattern) for pattern in only)]
    with contextlib.ExitStack() as stack:
        arena = Arena([make(stack.enter_context(Lab())) for make in CONTENDERS], {}, [])
        for number in range(runs):
            for compared in some:
                if number < max(1, round(compared.times * runs / 4)):
                    arena.compare(compared)
        picture = arena.story() if whole else ""
    text = "\n".join(
        [
            *arena.table(),
            "",
            *textwrap.wrap(caption(runs, load), 150),
            *(f"FAILED: {failed}" for failed in arena.failed),
        ]
    )
    print(text)
    if whole:
        PICTURE.write_text(picture)
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    print(f"{now() - began:.0f} s", *["written into README.md and docs/peers.svg"] * whole, file=sys.stderr)
    return 1 if arena.failed else 0
