#!/usr/bin/env python3
"""LinK's benchmark: every scenario of the issues' "Done when" tables, in lab.py's lab, judged against its bar.

Real kernels' addresses and ARP, real ZooKeeper, real processes and signals; lab.py's Probes says what "away" means.
A run whose precondition fails is told and makes its row MISSED; it is never dropped. Progress goes to stderr, the table
to stdout; exit code 0: every bar held, 1: not. It measures milliseconds: run it alone. LINK_LOG_LEVEL=DEBUG goes to the
agents as any LINK_ variable does. The order: figures, the cluster, what was seen, procedures, the rows, judging them.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import CLIENT, PROGRAM, Host, Lab, Observer, Result, merge, run, socket_in, wait_until

Measured = dict[str, float]
NEVER = math.inf
JOIN = 0.05  # outages closer than this count as one: the observer leaves probes out when it is held up
PROBES_A_SECOND = 2500  # what the client asks at most; more would measure the client
now, pause = time.monotonic, time.sleep

# -------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One number of a row and its bar; without limits it is told, not judged (but "never" is always a miss)."""

    name: str
    unit: str = "s"
    worst: float | None = None
    median: float | None = None
    least: float | None = None

    @property
    def bar(self) -> str:
        """The bar in words; "" if there is none."""
        limits = (("median ≤", self.median), ("≤", self.worst), ("≥", self.least))
        words = ", ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        if self.worst == 0 or (self.least is not None and self.worst == self.least):
            words = f"{self.worst:g}"
        return f"{self.name} {words} {self.unit}".strip() if words else ""

    def held(self, values: Sequence[float]) -> bool:
        """Whether these values are within the bar."""
        highest = sys.float_info.max if self.worst is None else self.worst
        lowest = -NEVER if self.least is None else self.least
        return lowest <= min(values) and max(values) <= highest and statistics.median(values) <= (self.median or NEVER)

    def show(self, value: float) -> str:
        """A value as the table has it."""
        text = f"{value:.3f}" if self.unit == "s" else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return f"{self.name} {'never' if value == NEVER else f'{text} {self.unit}'}".strip()


def away(worst: float | None = None, median: float | None = None) -> Figure:
    """The longest time without an answer for the client."""
    return Figure("away", worst=worst, median=median)


AWAY, TWO, LOST, EXIT = away(), Figure("two", worst=0), Figure("lost", "probes", 0), Figure("exit")
TWO_TOLD, LOST_TOLD, NEW_HOLDER = Figure("two"), Figure("lost", "probes"), Figure("new holder")
UNMOVED, NO_ACCUSING = Figure("transitions", "", 0), Figure("accusations", "", 0)
ONE_SOON, ONE_IN_THE_END = Figure("one after", worst=1), Figure("binders in the end", "", 1, least=1)

# ---------------------------------------------------------------------------------------------- what is under test


@dataclass
class Cluster:
    """A lab with agents, kept from run to run of one row, and made anew after a run that failed. A context manager.

    `config` goes to the agents; with `agents` false a run begins with hosts that are up and no agent on them. The
    agents run a copy of the program, which nobody edits meanwhile.
    """

    options: argparse.Namespace
    count: int = 3
    zookeeper: bool = True
    agents: bool = True
    ips: int = 1
    ipv6: bool = False
    check: bool = False  # each IP is checked against a service in the client's namespace
    config: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Cluster:
        """Make it."""
        with contextlib.ExitStack() as stack:
            self.lab = stack.enter_context(Lab(self.count))
            self.program = Path(shutil.copy(PROGRAM, self.lab.directory / "link.py"))
            self.hosts, self.dead = self.lab.hosts, set[Host]()
            self.zk: Any = self.lab.zookeeper() if self.zookeeper else None
            self.service: subprocess.Popen[bytes] | None = None
            self.vips = ["fd77::100" if self.ipv6 else self.lab.address(100)]
            if self.ips > 1:
                self.vips = [f"10.99.{n // 250}.{n % 250 + 1}" for n in range(self.ips)]
                run("ip", "-n", self.lab.client, "route", "add", "10.99.0.0/16", "dev", "eth0")
            checks = [{"type": "TCP", "host": self.lab.address(CLIENT), "port": 8080}] if self.check else []
            ips = [{"ip": vip, "checks": checks, "healthcheck_interval": 1} for vip in self.vips]
            self.settings = {"ips": ips, "zookeeper": self.zk.hosts if self.zk else None, **self.config}
            self._close = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self._close.close()

    def ready(self) -> None:
        """Repair what the last run broke; then one host must have all IPs, and the others must have heard it."""
        if self.check and (self.service is None or self.service.poll() is not None):
            command = ["ip", "netns", "exec", self.lab.client, sys.executable, "-m", "http.server", "8080"]
            self.service = self.lab.ledger.spawn(command, self.lab.directory / "log", cwd=self.hosts[0].directory)
        if not self.agents:
            self._stop_all()
        for host in self.dead:
            host.power_on()
        self.dead.clear()
        if self.agents:
            self._start_all()
        pause(random.uniform(1.5, 2))  # any phase of anybody's timers

    def _stop_all(self) -> None:
        running = [host for host in self.hosts if self.runs(host)]
        for host in running:
            host.kill(signal.SIGTERM)
        for host in self.hosts:
            if host in running and host.agent:
                host.agent.wait(15)
            self.kill(host)  # the last one keeps the IP when it stops, but not when it boots

    def _start_all(self) -> None:
        for host in sorted(self.hosts, key=lambda host: host not in self.binders()):
            if not self.runs(host):
                self.start(host)
                if self.ips > 1:  # one after another: one holder for all, and the same queue for each
                    self._settle()
        self._settle()

    def _settle(self) -> None:
        deadline = now() + 30 + self.ips / 20
        while trouble := self._unsettled():
            assert now() < deadline, f"precondition: {trouble}"
            pause(0.1 + self.ips / 500)

    def _unsettled(self) -> str:
        """What is not yet as a run needs it, in words."""
        running, binders = [host for host in self.hosts if self.runs(host)], self.binders()
        if len(binders) != 1 or len(self._bound(binders[0])) != self.ips:
            return f"bound on {[f'{host.name}: {len(self._bound(host))}' for host in binders]}"
        asks = self.config.get("probe_count", 3) and "promise" not in self.config
        for host in running:
            try:
                _, body = host.api("GET", "/ips")
            except (OSError, ValueError, http.client.HTTPException) as error:
                return f"{host.name} does not answer: {error!r}"
            for ip in body["ips"]:
                if ip["status"] != ("ACTIVATED" if host is binders[0] else "STANDBY"):
                    return f"{host.name} is {ip['status']}: {ip['reason']}"
                if self.zk and len(ip["hosts"]) != len(running):
                    return f"{host.name} sees the queue {ip['hosts']}"
                if asks and host is not binders[0] and ip["wire"]["state"] != "answered":
                    return f"{host.name} has not heard the holder: {ip['wire']}"
        return ""

    @staticmethod
    def runs(host: Host) -> bool:
        """Whether its agent does."""
        return host.agent is not None and host.agent.poll() is None

    def _bound(self, host: Host) -> set[str]:
        return host.addresses() & {f"{vip}/{128 if self.ipv6 else 32}" for vip in self.vips}

    def binders(self) -> list[Host]:
        """The hosts that are on and have at least one of the IPs bound."""
        return [host for host in self.hosts if host not in self.dead and self._bound(host)]

    def roles(self) -> tuple[Host, list[Host]]:
        """The holder and the others: with ZooKeeper in the queue's order."""
        holder = next(iter(self.binders()), self.hosts[0])
        others = [host for host in self.hosts if host is not holder]
        if self.agents and self.zk and others:
            queue = others[0].api("GET", "/ips")[1]["ips"][0]["hosts"]
            others.sort(key=lambda host: int(queue.index(host.name)))
        return holder, others

    def start(self, host: Host) -> None:
        """Start an agent."""
        host.start(self.program, **self.settings)

    def kill(self, host: Host) -> None:
        """The host dies; `ready` brings it back."""
        host.power_off()
        self.dead.add(host)

    def span(self, seconds: float) -> float:
        """The issue's time, or a sixth of it with --quick."""
        return seconds / 6 if self.options.quick else seconds

    def past_session(self) -> float:
        """Seconds after which the session of a host that has gone silent has surely ended."""
        return float(self.config.get("session_timeout", 4)) + 2


# -------------------------------------------------------------------------------------------------- what was seen


class Watch:
    """One run as seen by the client, the hosts' kernels and the agents' logs. A context manager.

    Of many IPs as many as the client can follow are asked every `interval`, and all of them now and then.
    """

    def __init__(self, cluster: Cluster, interval: float) -> None:
        """Start the observers."""
        self.cluster, vips = cluster, cluster.vips
        step = math.ceil(len(vips) / max(1, int(PROBES_A_SECOND * interval)))
        self._logs = {host: len(host.log()) for host in cluster.hosts}
        self._observers = [Observer(cluster.lab, vips[::step], interval)]
        if step > 1:
            self._observers.append(Observer(cluster.lab, vips, len(vips) / 500))

    def __enter__(self) -> Watch:
        """Let the first probes be answered."""
        pause(0.3 if len(self._observers) == 1 else 0.3 + len(self.cluster.vips) / 500)
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.client, self.all = self._observers[0].stop(), self._observers[-1].stop()
        self._each: list[Result] = [self.all.of(vip) for vip in self.cluster.vips]

    def lines(self, pattern: str, hosts: Sequence[Host]) -> int:
        """How many lines that match these hosts have logged since the beginning."""
        return sum(len(re.findall(pattern, host.log()[self._logs[host] :], re.M)) for host in hosts)

    def gap(self, since: float, until: float = NEVER) -> float:
        """The longest part of an outage for the client within this time."""
        return max([min(b, until) - max(a, since) for a, b in merge(self.client.outages, JOIN)] + [0])

    def wrong(self, least: int, most: int, since: float, until: float = NEVER) -> list[tuple[float, float]]:
        """When so many hosts on the LAN had an IP bound at once within this time."""
        spans = [span for seen in self._each for span in seen.holding(least, most)]
        return [(max(a, since), min(b, until)) for a, b in spans if b > since and a < until]

    def one_after(self, since: float) -> float:
        """How long after this moment it was until exactly one host on the LAN had each IP, for good."""
        last = max([end for _, end in self.wrong(0, 0, since) + self.wrong(2, 99, since)] + [since])
        return NEVER if last >= self.all.ended else last - since

    def figures(self, began: float, at: float, ended: float, victim: Host) -> Measured:
        """All that the rows choose from. Something began, at `at` it was complete, it ended; it befell the victim."""
        others = [host for host in self.cluster.hosts if host is not victim]
        starts = [[a for spans in seen.bound().values() for a, _ in spans if a > at] for seen in self._each]
        final = [
            [host for host, spans in seen.bound(True).items() if spans and spans[-1][1] >= self.all.ended]
            for seen in self._each
        ]
        turns = [self.client.of(vip).holders for vip in self.client.vips]
        quiet = [end for _, end in self.client.outages] + [at]
        follows = [turn[-1][1] - at if turn and turn[-1][0] != victim.name else NEVER for turn in turns]
        two_late = [b - a for a, b in self.wrong(2, 99, ended)]
        return {
            "away": self.gap(at),
            "away before": self.gap(0, at),
            "gap after the end": self.gap(ended),
            "all answering": NEVER if max(quiet) > self.client.ended - 0.1 else max(quiet) - at,
            "clients follow": max(follows),
            "moves": max(map(len, turns)) - 1,
            "lost": self.all.lost + (self.client.lost if self.client is not self.all else 0),
            "two": self.all.two_for()[0],
            "two anywhere": self.all.two_for(on_lan=False)[0],
            "two after the end": max([0.0, *two_late]),
            "none": self.all.none_for()[0],
            "none before": max([b - a for a, b in self.wrong(0, 0, began, at)] + [0]),
            "one after": self.one_after(at),
            "one after the start": self.one_after(began),
            "one after the end": self.one_after(ended),
            "new holder": max(min(found, default=NEVER) - at for found in starts),
            "binders in the end": max(map(len, final), key=lambda count: abs(count - 1)),
            "living binders": max(len(set(found) - {victim.name}) for found in final),
            "transitions": self.lines("ACTIVATED -> |-> ACTIVATED", self.cluster.hosts),
            "accusations": self.lines("taking over its lock|nobody answers for", self.cluster.hosts),
            "others' log": self.lines("^.", others),
        }


# ----------------------------------------------------------------------------------------------------- procedures

Procedure = Callable[[Cluster], Measured]
Act = Callable[[Cluster, Host], Any]  # may return more figures; "at" is when it was complete, if that matters
Wait = float | Callable[[Cluster], float]


def trial(
    act: Act,
    end: Act = lambda c, host: None,
    hold: Wait = Cluster.past_session,
    rest: float = 4,
    interval: float = 0.005,
    standby: bool = False,
    before: Act = lambda c, host: None,
) -> Procedure:
    """Do something to the holder (or the first standby), hold it, end it, rest; the client asks every `interval` s."""

    def procedure(c: Cluster) -> Measured:
        holder, others = c.roles()
        victim = others[0] if standby else holder
        before(c, victim)
        with Watch(c, interval) as seen:
            began = now()
            result = act(c, victim)
            pause(hold(c) if callable(hold) else hold)
            ended = now()
            end(c, victim)
            pause(rest)
        more: Measured = result if isinstance(result, dict) else {}
        return {**seen.figures(began, more.get("at", began), ended, victim), **more}

    return procedure


def unplug(c: Cluster, host: Host) -> Measured:
    """Pull the cable; the kernel needs its time for that, so it counts from when it is out."""
    host.unplug()
    return {"at": now()}


def stop(c: Cluster, host: Host) -> Measured:
    """SIGTERM, which must end in exit code 0."""
    code, took = host.stop(timeout=30)
    assert code == 0, f"exit code {code}"
    return {"exit": took}


def crash(c: Cluster, host: Host) -> None:
    """SIGKILL to the agent only."""
    host.stop(signal.SIGKILL)


def cut_and_stop(c: Cluster, host: Host) -> Measured:
    """ZooKeeper's packets are dropped, its connection stays open."""
    host.cut_zookeeper()
    pause(0.5)
    return stop(c, host)


def crash_loop(c: Cluster, host: Host) -> None:
    """Killed and started again at once, over and over."""
    until = now() + c.span(60)
    while now() < until:
        crash(c, host)
        c.start(host)
        pause(2)


def start_together(c: Cluster, host: Host) -> Measured:
    """On freshly booted hosts; complete when all serve."""
    for each in c.hosts:
        c.start(each)
    for each in c.hosts:
        each.wait_log(rf"INFO LinK .* on {each.name}(?![\s\S]*stopped)", 15)
    return {"at": now()}


def start_zookeeper(c: Cluster, host: Host) -> None:
    """After `c.zk.stop()`."""
    c.zk.start()
    c.zk.wait_ready()


def lose_zookeeper(c: Cluster, host: Host) -> None:
    """Kill it and wait until every session's time is over."""
    c.zk.stop()
    pause(c.past_session())


def load(c: Cluster, host: Host) -> None:
    """Two processes that never sleep, at the agents' own priority."""
    hogs = [c.lab.ledger.spawn([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    pause(c.options.busy or c.span(300))
    for hog in hogs:
        hog.kill()
        hog.wait()


def fail_checks_then_kill(c: Cluster, host: Host) -> Measured:
    """The service behind all checks goes; later the host of whoever has the IP."""
    assert c.service
    c.service.kill()
    c.service.wait()
    pause(max(8, c.span(30)))
    binders = c.binders()
    assert len(binders) == 1, f"bound on {[each.name for each in binders]}"
    died = now()
    c.kill(binders[0])
    return {"at": died}


def order(c: Cluster, host: Host, what: str) -> float:
    """POST failover or lock to a host: it must move the IP. How long the call took."""
    holder, began = c.roles()[0], now()
    status, body = host.api("POST", f"/ips/{c.vips[0]}/{what}", timeout=15)
    took = now() - began
    assert status == http.HTTPStatus.NO_CONTENT, f"{what} on {host.name}: {status} {body}"
    pause(0.5)
    assert holder not in c.binders(), f"{what} on {host.name}: 204, but {holder.name} still has the IP"
    return took


def failover_twice(c: Cluster, host: Host) -> Measured:
    """The holder gives; so does the next."""
    return {"order to answer": max(order(c, c.roles()[0], "failover") for _ in range(2))}


def lock_there_and_back(c: Cluster, host: Host) -> Measured:
    """The last in the queue takes, then the old holder takes it back."""
    return {"order to answer": max(order(c, taker, "lock") for taker in (c.roles()[1][-1], host))}


def upgrade(c: Cluster, host: Host) -> Measured:
    """A new program file, then SIGHUP."""
    version, new = f"9.{random.randrange(10**9)}", c.program.with_suffix(".new")
    new.write_text(re.sub(r"(?m)^VERSION = .*", f'VERSION = "{version}"', c.program.read_text(), count=1))
    new.rename(c.program)

    def renewed() -> bool:
        pause(0.05)  # not to be a load itself
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(host.api("GET", "/version")[1]["version"] == version)
        return False

    began = now()
    host.kill(signal.SIGHUP)
    wait_until(renewed, 15, f"the new version on {host.name}")
    return {"new version after": now() - began}


def announce(host: Host, vip: str) -> None:
    """One gratuitous ARP reply (RFC 5227), made by hand."""
    mac, ip = bytes.fromhex(host.mac.replace(":", "")), socket.inet_aton(vip)
    with socket_in(host.namespace, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((host.interface, 0))
        sock.send(b"\xff" * 6 + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 2) + (mac + ip) * 2)


def bind_by_hand(c: Cluster, host: Host) -> None:
    """What an agent does, without one; a boot ends it."""
    host.add_address(f"{c.vips[0]}/32")
    announce(host, c.vips[0])


def isolate_and_bind(c: Cluster, host: Host) -> None:
    """A host dies, and detection and decision cost nothing."""
    host.isolate()
    bind_by_hand(c, c.hosts[1])


def move_by_hand(c: Cluster, host: Host) -> None:
    """New before old."""
    bind_by_hand(c, c.hosts[1])
    host.del_address(f"{c.vips[0]}/32")


def idle(c: Cluster) -> Measured:
    """Nothing happens for a minute, and no client asks. The standby is the first, the one that probes."""
    holder, (standby, *_) = c.roles()
    pause(max(2, c.span(12)))  # the announcements after a bind are over
    pair = {"holder": holder, "standby": standby}
    began, before = now(), {role: cost(host) for role, host in pair.items()}
    figures = {"standby ARP": count_arps(c.lab, standby, c.span(60)) / c.span(60)}
    took = now() - began
    for role, host in pair.items():
        (cpu, memory, sent), (old_cpu, _, old_sent) = cost(host), before[role]
        rates = ((cpu - old_cpu) / took * 60, memory, (sent - old_sent) / took)
        figures |= zip((f"{role} CPU", f"{role} RSS", f"{role} sent"), rates, strict=True)
    return figures


def cost(host: Host) -> tuple[float, float, float]:
    """CPU seconds so far and megabytes of the agent; packets that its host has sent."""
    assert host.agent
    process = Path(f"/proc/{host.agent.pid}")
    ticks = sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:13]))
    pages = int((process / "statm").read_text().split()[1])
    link = json.loads(host.ip("-j", "-s", "link", "show", "dev", host.interface))[0]
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6, link["stats64"]["tx"]["packets"]


def count_arps(lab: Lab, host: Host, seconds: float) -> int:
    """How many ARP packets come out of a host's cable within this time."""
    count, until = 0, now() + seconds
    with socket_in(lab.switch, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:  # ETH_P_ALL
        sock.bind((host.port, 3))
        while (left := until - now()) > 0:
            sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                _, (_, protocol, kind, *_) = sock.recvfrom(64)
                count += protocol == 0x0806 and kind != 4  # PACKET_OUTGOING
    return count


# ----------------------------------------------------------------------------------------------------------- rows


class Row:
    """One scenario: the issue's words, what is measured with which bars, how, how often at --runs 20, on what."""

    def __init__(
        self, id: str, scenario: str, procedure: Procedure, *figures: Figure, times: int = 20, **cluster: Any
    ) -> None:
        """Describe it."""
        self.id, self.scenario, self.procedure, self.figures = id, scenario, procedure, figures
        self.times, self.cluster = times, cluster
        self.bar = "; ".join(figure.bar for figure in figures if figure.bar) or "told only"


def settings(**config: Any) -> dict[str, Any]:
    """A cluster whose agents do not have the defaults."""
    return {"config": config}


death = trial(Cluster.kill, hold=3, rest=0)
death_many = trial(Cluster.kill, hold=lambda c: 3 + c.ips / 60, rest=0, interval=0.02)
death_by_session = trial(Cluster.kill, hold=Cluster.past_session, rest=1)
death_in_the_dark = trial(Cluster.kill, start_zookeeper, hold=4, rest=0, before=lose_zookeeper)
outage = trial(lambda c, _: c.zk.stop(), start_zookeeper, hold=lambda c: c.span(60), rest=5)
sigterm = trial(stop, hold=1.5, rest=0, interval=0.001)
FLOOR: dict[str, Any] = {"agents": False, "zookeeper": False, "count": 2}
PROMISE = settings(promise="at-most-one")
DEATH = (away(0.35, median=0.2), TWO, ONE_SOON, NEW_HOLDER)
DEATH_ALONE = (away(1, median=0.5), ONE_SOON, TWO_TOLD)
DEATH_IN_THE_DARK = (away(median=0.5), ONE_SOON, TWO_TOLD)
SPLIT = (Figure("new holder", worst=0.35), AWAY, Figure("one after the end", worst=1),
         Figure("gap after the end", worst=0.2), Figure("two after the end"))  # fmt: skip
MANY = (Figure("new holder"), Figure("all answering"), TWO)
LEAVE = (LOST, Figure("exit", worst=1), TWO_TOLD)
MOVE = (LOST, AWAY, TWO_TOLD, Figure("order to answer"))
RESTART = (LOST, UNMOVED, Figure("others' log", "lines", 0))
AT_MOST_ONE = (Figure("two anywhere", worst=0.001), NEW_HOLDER, AWAY)  # events are read in turn: 1 ms is their order
IDLE = [Figure(f"{role} {name}", unit) for role in ("holder", "standby")
        for name, unit in (("CPU", "s/min"), ("RSS", "MB"), ("sent", "/s"))]  # fmt: skip
IDLE.append(Figure("standby ARP", "/s", 25))

ROWS = (
    Row("0-quiet", "floor: nothing happens for 10 s, client at 1 ms",
        trial(lambda *_: None, hold=10, rest=0, interval=0.001, before=bind_by_hand), LOST_TOLD, AWAY, **FLOOR),
    Row("0-death", "floor: the lab itself moves the IP from a dead host, client at 1 ms",
        trial(isolate_and_bind, hold=1, rest=0, interval=0.001, before=bind_by_hand), AWAY, TWO_TOLD, **FLOOR),
    Row("0-move", "floor: the lab itself moves the IP, new before old, client at 1 ms",
        trial(move_by_hand, hold=1, rest=0, interval=0.001, before=bind_by_hand), LOST_TOLD, TWO_TOLD, **FLOOR),
    Row("2-death-blind", "host death, probing off, tick 500 ms, session_timeout 2",
        death_by_session, away(3), TWO, **settings(probe_count=0, session_timeout=2)),
    Row("2-death", "host death, session_timeout 2", death, away(3), TWO, **settings(session_timeout=2)),
    Row("2-sigterm", "a clean SIGTERM", sigterm, away(0.3), LOST_TOLD, EXIT, **settings(session_timeout=2)),
    Row("2-start", "three agents start at the same instant, 30 times",
        trial(start_together, hold=4, rest=0), TWO, Figure("one after the start"), times=30, agents=False),
    Row("3-death", "host death, defaults, 3 hosts + ZooKeeper", death, *DEATH),
    Row("3-death-6", "IPv6: host death, defaults, 3 hosts + ZooKeeper", death, *DEATH, ipv6=True),
    Row("3-death-10ms", "the same with `probe_interval: 0.01`",
        death, away(median=0.05), TWO, NEW_HOLDER, **settings(probe_interval=0.01)),
    Row("3-death-wire", "host death without any ZooKeeper", death, *DEATH_ALONE, zookeeper=False),
    Row("3-death-wire-6", "IPv6: host death without any ZooKeeper", death, *DEATH_ALONE, zookeeper=False, ipv6=True),
    Row("3-zookeeper", "ZooKeeper dead for 60 s", outage, LOST, UNMOVED, TWO),
    Row("3-zookeeper-death", "ZooKeeper dead *and* then the holder's host dies", death_in_the_dark, *DEATH_IN_THE_DARK),
    Row("3-zookeeper-death-6", "IPv6: ZooKeeper dead *and* then the holder's host dies",
        death_in_the_dark, *DEATH_IN_THE_DARK, ipv6=True),
    Row("3-cable", "cable pulled on the holder, ZooKeeper on the same LAN; healed",
        trial(unplug, lambda _, host: host.plug(), rest=5), *SPLIT),
    Row("3-isolated", "the same, but its carrier stays (a switch fails)",
        trial(lambda _, host: host.isolate(), lambda _, host: host.heal(), rest=5), *SPLIT),
    Row("3-cut", "holder cut off from ZooKeeper only; mended",
        trial(lambda _, host: host.cut_zookeeper(), lambda _, host: host.mend_zookeeper()),
        away(0), LOST, Figure("two", worst=1), ONE_IN_THE_END),
    Row("3-hung", "holder's agent SIGSTOPped past its session, then continued",
        trial(lambda _, host: host.kill(signal.SIGSTOP), lambda _, host: host.kill(signal.SIGCONT)),
        away(0.3), Figure("one after the end", worst=1), TWO_TOLD),
    Row("3-standby-unplugged", "a standby's own cable pulled",
        trial(unplug, lambda _, host: host.plug(), standby=True), NO_ACCUSING, UNMOVED, LOST, TWO),
    Row("3-standby-deaf", "a standby's NIC up but deaf",
        trial(lambda _, host: host.deafen(), lambda _, host: host.heal(), standby=True),
        NO_ACCUSING, UNMOVED, LOST, TWO),
    Row("3-busy", "both cores loaded by two busy processes for 5 minutes, defaults",
        trial(load, hold=0, rest=1), NO_ACCUSING, UNMOVED, LOST_TOLD, times=0),
    Row("3-start", "three agents start together with no ZooKeeper, 50 times; from when all serve",
        trial(start_together, hold=4, rest=0), ONE_SOON, TWO_TOLD, Figure("one after the start"),
        times=50, zookeeper=False, agents=False),
    Row("4-failover", "planned move by failover, 3 hosts, there and back 100 times",
        trial(failover_twice, hold=0, rest=0.5, interval=0.001), *MOVE, times=100),
    Row("4-lock", "planned move by lock, 3 hosts, there and back 100 times",
        trial(lock_there_and_back, hold=0, rest=0.5, interval=0.001), *MOVE, times=100),
    Row("4-sigterm", "SIGTERM on the holder, 1 IP", sigterm, *LEAVE),
    Row("4-sigterm-100", "SIGTERM on the holder, 100 IPs", sigterm, *LEAVE, ips=100),
    Row("4-only-host", "SIGTERM on the only host; start again",
        trial(stop, Cluster.start, hold=1, interval=0.001), LOST, away(0), Figure("none", worst=0), EXIT, count=1),
    Row("4-crash-0.1", "SIGKILL and restart after 0.1 s", trial(crash, Cluster.start, hold=0.1, rest=7), *RESTART),
    Row("4-crash-1", "SIGKILL and restart after 1 s", trial(crash, Cluster.start, hold=1, rest=7), *RESTART),
    Row("4-crash", "SIGKILL, not restarted (at-least-one): session timeout + tick + 1 s; its kernel keeps the IP",
        trial(crash, Cluster.kill, hold=8.5, rest=0),
        Figure("clients follow", worst=5.5), Figure("living binders", "", 1, least=1), AWAY),
    Row("4-sighup", "SIGHUP with a new version, 50 times",
        trial(upgrade, hold=2, rest=0, interval=0.001), LOST, UNMOVED, Figure("new version after"), times=50),
    Row("4-checks", "all hosts' checks failing for 30 s; then the binder's host dies",
        trial(fail_checks_then_kill, rest=2), Figure("away before", worst=0), Figure("none before", worst=0), TWO,
        AWAY, ONE_IN_THE_END, check=True),
    Row("4-one-hung", "at-most-one: holder SIGSTOPped (then continued)",
        trial(lambda _, host: host.kill(signal.SIGSTOP), lambda _, host: host.kill(signal.SIGCONT), 8, 3, 0.001),
        *AT_MOST_ONE, **PROMISE),
    Row("4-one-killed", "at-most-one: holder SIGKILLed", trial(crash, hold=8, rest=0, interval=0.001),
        *AT_MOST_ONE, **PROMISE),
    Row("4-one-cut", "at-most-one: holder cut off from ZooKeeper (then mended)",
        trial(lambda _, host: host.cut_zookeeper(), lambda _, host: host.mend_zookeeper(), 8, 3, 0.001),
        *AT_MOST_ONE, **PROMISE),
    Row("4-stop-dark", "stop with ZooKeeper black-holed (`stop_timeout` 10 s)",
        trial(cut_and_stop, lambda _, host: host.mend_zookeeper(), hold=1, rest=0),
        Figure("exit", worst=10), LOST_TOLD),
    Row("4-crash-loop", "crash loop every 2 s for a minute",
        trial(crash_loop, hold=2, rest=0), Figure("moves", "", 0), LOST, TWO_TOLD),
    Row("5-death-100", "host death, 100 IPs", death_many, *MANY, ips=100),
    Row("5-death-1000", "host death, 1000 IPs: last bound, all answering", death_many, *MANY, ips=1000),
    Row("5-idle", "idle cost of 1 IP", idle, *IDLE, times=3),
    Row("5-idle-1000", "idle cost of 1000 IPs", idle, *IDLE, times=3, ips=1000),
)  # fmt: skip

# --------------------------------------------------------------------------------------------- running and judging


@dataclass
class Record:
    """What became of a row: what each run measured, and what went wrong in the others."""

    row: Row
    runs: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def misses(self) -> list[str]:
        """The figures whose bar is not held."""
        return [f.name for f in self.row.figures if not f.held([run[f.name] for run in self.runs])] if self.runs else []

    def cells(self) -> list[str]:
        """The row of the table."""
        runs = f"{len(self.runs)}" + (f" + {len(self.failed)} FAILED" if self.failed else "")
        verdict = "ok" if self.runs and not self.failed and not self.misses() else "MISSED"
        median, worst = self.show(statistics.median), self.show(max)
        return [f"{self.row.scenario} ({self.row.id})", self.row.bar, median, worst, runs, verdict]

    def show(self, pick: Callable[[list[float]], float]) -> str:
        """The figures of all runs in one."""
        return ", ".join(f.show(pick([run[f.name] for run in self.runs])) for f in self.row.figures if self.runs)


def measure(row: Row, options: argparse.Namespace) -> Record:
    """All runs of one row."""
    record, times = Record(row), max(1, round(row.times * options.runs / 20))
    with contextlib.ExitStack() as stack:
        cluster: Cluster | None = None
        for number in range(1, times + 1):
            print(f"{row.id} {number}/{times}: ", end="", file=sys.stderr, flush=True)
            one = Record(row)
            try:
                cluster = cluster or stack.enter_context(Cluster(options, **row.cluster))
                cluster.ready()
                one.runs.append(row.procedure(cluster))
            except (AssertionError, RuntimeError, OSError, subprocess.SubprocessError, LookupError) as error:
                one.failed.append(f"FAILED: {type(error).__name__}: {error}")
            bad = ", ".join(one.failed + one.misses())
            print(one.show(max), bad and f" <- {bad}", file=sys.stderr, flush=True)
            if bad and cluster and options.logs:
                save_logs(cluster, options.logs / f"{row.id}-{number}")
            record.runs += one.runs
            record.failed += one.failed
            if one.failed:
                cluster = None
                stack.close()
    return record


def save_logs(cluster: Cluster, directory: Path) -> None:
    """Keep the agents' logs of a run that went wrong."""
    directory.mkdir(parents=True, exist_ok=True)
    for host in cluster.hosts:
        (directory / f"{host.name}.log").write_text(host.log())


def table(records: Sequence[Record], aligned: bool) -> str:
    """The markdown table."""
    rows = [["scenario", "bar", "median", "worst", "runs", ""], *(record.cells() for record in records)]
    widths = [max(len(line[n]) for line in rows) if aligned else 0 for n in range(len(rows[0]))]
    rows.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in rows)


@contextlib.contextmanager
def room_for_neighbours() -> Iterator[None]:
    """Let the kernel know thousands of neighbours; the limits of all namespaces are those in the first one's /proc."""
    files = [Path(f"/proc/sys/net/ipv4/neigh/default/gc_thresh{n}") for n in (3, 2, 1)]
    before = {file: file.read_text() for file in files if file.exists()}
    try:
        for file, value in before.items():
            file.write_text(str(max(int(value), 20000)))
        yield
    finally:
        for file, value in before.items():
            file.write_text(value)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure LinK against the bars of its issues.")
    option = parser.add_argument
    option("--runs", type=int, default=20, metavar="N", help="runs per row (20); some rows take a part or a multiple")
    option("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows by id, for example '3-death*'")
    option("--list", action="store_true", help="print the rows and their bars")
    option("--quick", action="store_true", help="a sixth of the time where the issue waits long")
    option("--busy", type=float, metavar="SECONDS", help="how long the busy processes run (300)")
    option("--json", type=Path, metavar="FILE", help="write every figure of every run")
    option("--markdown", action="store_true", help="do not align the columns of the table")
    option("--logs", type=Path, metavar="DIRECTORY", help="keep the agents' logs of runs that went wrong")
    options = parser.parse_args()
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.id, pattern) for pattern in options.only)]
    if options.list or not rows:
        print("\n".join(f"{row.id:20} {row.scenario}\n{'':20} {row.bar}" for row in rows or ROWS))
        return 0 if rows else 2
    records: list[Record] = []
    with room_for_neighbours(), contextlib.suppress(KeyboardInterrupt):
        for row in rows:
            records.append(measure(row, options))
            if options.json:
                report = {r.row.id: {"scenario": r.row.scenario, "runs": r.runs, "failed": r.failed} for r in records}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(records, not options.markdown))
    return 0 if len(records) == len(rows) and all(record.cells()[-1] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
