"""What happens to the hosts of a lab, and what must come of it: one list, ROWS, for the suite and for the benchmark.

A row is a procedure, who must have the IP in the end, and figures. test_real.py does each row once, with short
sessions, and asserts who and each figure's limit for one run; bench.py does it many times, with LinK's defaults, and
judges the bars. The order of the file: figures, the cluster, what was seen, procedures, the rows.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
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
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lab
from lab import Ear, Host, Lab, Observer, Result, Service, ZooKeeper, reap, wait_until

Measured = dict[str, float]
NEVER = math.inf
JOIN = 0.05  # outages closer than this count as one: the observer leaves probes out when it is held up
PROBES_A_SECOND = 2500  # what the client asks at most; more would measure the client
MANY = 9  # so many IPs come by configuration, not by the API
QUICK = {"session_timeout": 2, "health_check_fall": 1, "health_check_timeout": 1}  # the suite's
CHECK = {"type": "TCP", "host": "127.0.0.1", "port": 8080}
CHECKED: dict[str, Any] = {"checks": [CHECK], "healthcheck_interval": 1}
BEFORE = "71fff8f"  # the version that must be upgradable without a lost packet
now, pause = time.monotonic, time.sleep

# -------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One number of a row and its bar; without limits it is told, not judged (but "never" is always a miss).

    `once` is the limit for a single run on any machine, in the suite; where it is not given it is `worst`.
    """

    name: str
    unit: str = "s"
    worst: float | None = None
    median: float | None = None
    least: float | None = None
    once: float | None = None

    @property
    def bar(self) -> str:
        """The bar in words; "" if there is none."""
        limits = (("median ≤", self.median), ("≤", self.worst), ("≥", self.least))
        words = ", ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        if self.worst == 0 or (self.least is not None and self.worst == self.least):
            words = f"{self.worst:g}"
        return f"{self.name} {words} {self.unit}".strip() if words else ""

    def held(self, values: Sequence[float], once: bool = False) -> bool:
        """Whether these values are within the bar; with `once`, the one run of the suite."""
        worst = self.once if once and self.once is not None else self.worst
        highest, lowest = sys.float_info.max if worst is None else worst, self.least or 0
        usual = once or self.median is None or statistics.median(values) <= self.median
        return lowest <= min(values) and max(values) <= highest and usual

    def show(self, value: float) -> str:
        """A value as the table has it."""
        text = f"{value:.3f}" if self.unit == "s" else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return f"{self.name} {'never' if value == NEVER else f'{text} {self.unit}'}".strip()


away = partial(Figure, "away", "s")  # the longest time without an answer for the client
two = partial(Figure, "two", "s")  # the longest time for which two hosts on the LAN had an IP
# After the heal. Who was isolated may have to look up the client anew, and its kernel asks again only after a second
# (RetransTimer, RFC 4861; neigh/retrans_time_ms): that much is not LinK's.
gap = partial(Figure, "gap after the end", "s")

# ---------------------------------------------------------------------------------------------------- the cluster


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Do these at the same time."""
    with ThreadPoolExecutor(max(1, len(actions))) as pool:
        return [future.result() for future in [pool.submit(action) for action in actions]]


class Cluster:
    """The hosts of a lab and their agents, one configuration for all; whatever befell them, `reset` mends it.

    The agents run a copy of the program, which nobody edits meanwhile. `quick`: as the suite has it; what takes long
    in the benchmark is divided by `shorter`.
    """

    def __init__(self, world: Lab, quick: bool = True, shorter: float = 1) -> None:
        self.lab, self.hosts, self.quick, self.shorter = world, world.hosts, quick, shorter
        lab.ip(world.client, *(f"route add {net} dev eth0" for net in ("10.77.0.0/16", "10.99.0.0/16")))
        self.program, self.source = world.directory / "link.py", lab.PROGRAM.read_text()
        self.zk: Any = None
        self.config: dict[str, Any] = {}
        self.networks, self.among, self.serving = 1, self.hosts, True  # whose the IPs are; whether agents are to run
        self.services: dict[Host, Service] = {}
        self.vips: list[str] = []
        self._zookeepers: dict[int, ZooKeeper | None] = {0: None}
        self._last, self._marks = itertools.count(2), dict[str, int]()

    # between the scenarios

    def prepare(self, row: Row, families: str) -> None:
        """All as a row needs it: one host has all its IPs, and the others have heard it."""
        config = {**(QUICK if self.quick else {}), **row.config, **(row.quick if self.quick else {})}
        vips = [self.fresh(int(family)) for family in families] if row.ips == 1 else []
        vips = vips or [f"10.99.{n // 250}.{n % 250 + 1}" for n in range(row.ips)]
        if row.ips >= MANY:
            config["ips"] = [{"ip": vip} for vip in vips]
        program = row.program() if row.program else ""
        self.reset(row.zookeeper, config, row.networks, row.agents and row.ips < MANY, program)
        self.vips, self.among, self.serving = vips, self.hosts[: row.hosts], row.agents
        if row.check:
            self.services = {host: Service(host) for host in self.hosts}
        for host in self.among if row.agents and vips else []:
            if row.ips >= MANY:
                self.start_afresh(host)
                wait_until(partial(self.serves, host), 60)
                in_queues = partial(self._all_heard, host, host.number if row.zookeeper else 0, False)
                wait_until(in_queues, 60, f"{host.name}: in all queues")  # else each queue has an order of its own
            else:
                together(*(partial(self.add, host, vip=vip, **(CHECKED if row.check else {})) for vip in vips))
            if host is self.hosts[0]:  # one holder for all, and the same queue for each
                wait_until(lambda: set(vips) <= self.hosts[0].bound(), 60, "all bound")
        if row.agents and vips:
            holder, others = self.settled(self.vips[0], 60)
            asks = row.config.get("probe_count", 3) and "promise" not in row.config
            for host in [holder, *others]:  # with a lock the second standby asks for one IP a second
                heard = host is not holder and (host is others[0] or not row.zookeeper or row.ips < MANY)
                queued = len(self.among) if row.zookeeper else 0
                ready = partial(self._all_heard, host, queued, asks and heard)
                wait_until(ready, 10 + row.ips / 20, f"{host.name}: all in the queue, the holder heard")
        pause(0.2 if self.quick else random.uniform(1.5, 2))  # any phase of anybody's timers
        self.mark()

    def _all_heard(self, host: Host, queued: int, heard: bool) -> bool:
        ips = [ip for ip in host.api("GET", "/ips")[1]["ips"] if ip["ip"].partition("/")[0] in self.vips]
        # "?": a host that has just come back, whose old session still has its name: nobody can accuse it yet
        fine = [ip for ip in ips if not queued or (len(ip["hosts"]) == queued and "?" not in ip["hosts"])]
        return len([ip for ip in fine if not heard or ip["wire"]["state"] == "answered"]) == len(self.vips)

    def reset(
        self, zookeeper: int, config: dict[str, Any], networks: int = 1, agents: bool = True, program: str = ""
    ) -> Cluster:
        """No fault, no virtual IP, and (but for `agents`) a new agent with this configuration on every host."""
        self.mend()
        for service in self.services.values():
            service.stop()
        self.vips, self.among, self.services, self.serving = [], self.hosts, {}, agents
        if networks != self.networks:
            self.networks = networks
            self._second_network() if networks == 2 else [host.ip("link del mgmt0") for host in self.hosts]
        if zookeeper not in self._zookeepers:
            self._zookeepers[zookeeper] = ZooKeeper(self.lab, zookeeper)
        self.zk = self._zookeepers[zookeeper]
        self.config = {**config, "zookeeper": self.zk.hosts} if self.zk else config
        self.program.write_text(program or self.source)
        together(*(partial(self.start_afresh if agents else self._clear, host) for host in self.hosts))
        if agents:
            self.all_serve(20)
        self.mark()
        return self

    def mend(self) -> None:
        """End every fault; ZooKeeper and all hosts are there again, agents that have ended are not started."""
        if self.zk:
            self.zk.start()
        for host in self.hosts:
            found = host.ip("addr")
            if f" {host.mac} " not in found or f" {host.address}/" not in found:
                self.rewire(host)
            host.mend()

    def rewire(self, host: Host) -> None:
        """Throw the network card away, if there is one, and put in a new one."""
        with contextlib.suppress(RuntimeError):
            host.ip(f"link del {host.interface}")
        self.lab.cable(host.namespace, host.interface, host.port, host.number)

    def _second_network(self) -> None:
        """From now on ZooKeeper is reached by a network card of its own."""
        for n, host in enumerate(self.hosts, 1):
            card = f"link add m{n} type veth peer name mgmt0 netns {host.namespace}"
            lab.ip(self.lab.zk, card, f"addr add 172.31.{n}.1/30 dev m{n}", f"link set m{n} up")
            route = f"route add {self.lab.address(lab.ZOOKEEPER)}/32 via 172.31.{n}.1 src 172.31.{n}.2"
            lab.ip(host.namespace, f"addr add 172.31.{n}.2/30 dev mgmt0", "link set mgmt0 up", route)

    # agents

    def _clear(self, host: Host) -> None:
        reap(host.agent)
        shutil.rmtree(host.directory / "state", ignore_errors=True)
        host.del_address(*host.strange())

    def start_afresh(self, host: Host, **config: Any) -> None:
        """Kill the agent, forget what it knew, start it with this beside the usual configuration."""
        self._clear(host)
        self.start(host, **{**self.config, **config})

    def start(self, host: Host, **config: Any) -> None:
        """Start the agent, as it was configured last if nothing is said."""
        host.start(self.program, **(config or host.config))

    def restart(self, **config: Any) -> None:
        """All agents afresh, with this beside the usual configuration."""
        together(*(partial(self.start_afresh, host, **config) for host in self.hosts))
        self.all_serve(10)

    def serves(self, host: Host) -> bool:
        """Whether the agent answers, and knows ZooKeeper."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            state = host.api("GET", "/health")[1]["zookeeper"]["state"]
            return bool(state == ("connected" if host.config.get("zookeeper") else "none"))
        return False

    def all_serve(self, timeout: float) -> None:
        wait_until(lambda: all(map(self.serves, self.hosts)), timeout, "every agent serves")

    # virtual IPs

    def fresh(self, family: int = 4) -> str:
        """An address that was not used before."""
        number = next(self._last)
        return f"fd77::1:{number}" if family == 6 else f"10.77.{1 + number // 250}.{1 + number % 250}"

    def add(self, *hosts: Host, vip: str = "", **more: Any) -> str:
        """POST it to these hosts (all of them, if none is named), one after another."""
        vip = vip or self.fresh()
        for host in hosts or self.hosts:
            status, answer = host.api("POST", "/ips", {"ip": vip, **more})
            assert status == 201, answer
        return vip

    def show(self, host: Host, vip: str) -> dict[str, Any]:
        """The IP as this host's API shows it, {} if it does not."""
        try:
            return dict((host.api("GET", f"/ips/{vip}")[1] or {}).get("ip", {}))
        except (OSError, http.client.HTTPException):
            return {}

    def status(self, host: Host, vip: str) -> str:
        return str(self.show(host, vip).get("status", ""))

    def bound(self, vip: str) -> list[Host]:
        """The hosts whose kernel has it."""
        return [host for host in self.hosts if vip in host.bound()]

    def elsewhere(self, vip: str, than: Host, timeout: float = 5.0) -> Host:
        """Wait until another host than this one has it; who."""
        return wait_until(lambda: [h for h in self.bound(vip) if h is not than], timeout, f"{vip} elsewhere")[0]

    def settled(self, vip: str, timeout: float = 6.0, among: Iterable[Host] = ()) -> tuple[Host, list[Host]]:
        """Wait until exactly one host has it and all agents say so; the holder, and the others in the queue's order."""
        among = list(among) or [host for host in self.among if host.on]

        def settle() -> Host | None:
            found = [host for host in self.bound(vip) if host in among]
            states = sorted(self.status(host, vip) for host in among if host.alive)
            return found[0] if len(found) == 1 and states == ["ACTIVATED", *["STANDBY"] * (len(states) - 1)] else None

        def queue(holder: Host) -> list[str]:
            names = [str(name) for name in self.show(holder, vip).get("hosts", [])]
            return names if len(names) == len(others) + 1 and "?" not in names else []  # "?": has yet to be read

        holder = wait_until(settle, timeout, f"{vip} settled")
        assert holder
        others = [host for host in among if host is not holder and host.alive]
        if self.zk:
            order = wait_until(partial(queue, holder), timeout, f"all in the queue for {vip}")
            others.sort(key=lambda host: order.index(host.name))
        return holder, others

    def held(self, family: int = 4) -> tuple[str, Host, list[Host]]:
        """A new IP on all hosts; its address, its holder, and the others in the queue's order."""
        vip = self.add(vip=self.fresh(family))
        return vip, *self.settled(vip)

    def alone(self, *families: int) -> tuple[Host, list[str]]:
        """New IPs on the first host only, which has them."""
        vips = [self.add(self.hosts[0], vip=self.fresh(family)) for family in families or [4]]
        for vip in vips:
            assert self.settled(vip, among=self.hosts[:1])[0] is self.hosts[0]
        return self.hosts[0], vips

    def roles(self) -> tuple[Host, list[Host]]:
        """The holder, and the others in the queue's order; without agents the first host, and the others."""
        return self.settled(self.vips[0]) if self.serving and self.vips else (self.hosts[0], self.hosts[1:])

    @contextlib.contextmanager
    def watch(
        self, *vips: str, every: float = 0.005, lost: float = NEVER, away: float = NEVER, two: float = NEVER,
        quiet: bool = False,
    ) -> Iterator[Observer]:  # fmt: skip
        """Observe, and assert at the end: probes lost, longest outage and overlap in s, no transition at all."""
        self.mark()
        with Observer(self.lab, vips, every) as observer:
            yield observer
        result = observer.result
        tell(result)
        assert result.lost <= lost, (result.lost, result.outages)
        assert result.away <= away, result.outages
        assert result.longest(2, 99) <= two, result.bound()
        assert not quiet or not self.transitions(*vips), self.transitions(*vips)

    # logs

    def mark(self) -> None:
        """Look at the logs from here on."""
        self._marks = {host.name: len(host.log()) for host in self.hosts}

    def news(self, host: Host) -> str:
        """What the agent has logged since the mark."""
        return host.log()[self._marks.get(host.name, 0) :]

    def transitions(self, *vips: str) -> list[str]:
        """Every change of state of these IPs since the mark."""
        news = [f"{host.name} {line}" for host in self.hosts for line in self.news(host).splitlines() if " -> " in line]
        return [line for line in news if any(f"vip={vip}/" in line for vip in vips)]

    # times

    def span(self, seconds: float) -> float:
        """A time that something must go on for, shorter with --quick and in the suite."""
        return seconds / self.shorter

    def wait(self, wait: Wait, longest: float) -> float:
        """A time for things to show; in the suite no longer than this."""
        seconds = wait(self) if callable(wait) else wait
        return min(seconds, longest) if self.quick and not callable(wait) else seconds

    def well_past_session(self) -> float:
        """Seconds after which what follows from that has surely happened."""
        return self.past_session() + (1 if self.quick else 2.5)

    def past_session(self) -> float:
        """Seconds after which the session of a host that has gone silent has surely ended."""
        return float(self.config.get("session_timeout", 4)) + (1.5 if self.quick else 2)


def tell(result: Result) -> None:
    """For pytest's report."""
    for one in map(result.of, result.vips[:4]):
        print(f"---- {one.vips[0]} answered by {one.holders}\naway {one.outages}\nbound {one.bound()}")


# -------------------------------------------------------------------------------------------------- what was seen


def observers(c: Cluster, interval: float) -> list[Observer]:
    """Of many IPs as many as the client can follow are asked every `interval`, and all of them now and then."""
    step = math.ceil(len(c.vips) / max(1, int(PROBES_A_SECOND * interval)))
    seen = [Observer(c.lab, c.vips[::step], interval)]
    seen += [Observer(c.lab, c.vips, len(c.vips) / 500)] if step > 1 else []
    pause(0.3 if step == 1 else 0.3 + len(c.vips) / 500)  # let the first probes be answered
    return seen


def one_after(result: Result, since: float) -> float:
    """How long after this moment it was until exactly one host on the LAN had each IP, for good."""
    wrong = result.holding(0, 0, since=since) + result.holding(2, 99, since=since)
    last = max([end for _, end in wrong] + [since])
    return NEVER if last >= result.ended else last - since


def figures(
    c: Cluster, seen: list[Observer], began: float, at: float, ended: float, victim: Host, holder: Host
) -> Measured:
    """All that the rows choose from. Something began, at `at` it was complete, it ended; it befell the victim."""
    client, total, news = seen[0].result, seen[-1].result, {host: c.news(host) for host in c.hosts}
    each = [total.of(vip) for vip in total.vips]
    outages = lab.merge(client.outages, JOIN)
    quiet = max([end for _, end in outages] + [at])
    starts = [[a for spans in one.bound().values() for a, _ in spans if a > at] for one in each]
    final = [[host for host, b in one.bound(True).items() if b and b[-1][1] >= total.ended] for one in each]
    turns = [client.of(vip).holders for vip in client.vips]

    def gap(since: float, until: float = NEVER) -> float:
        return max([min(b, until) - max(a, since) for a, b in outages] + [0])

    def lines(pattern: str, but: Host | None = None) -> int:
        return sum(len(re.findall(pattern, text, re.M)) for host, text in news.items() if host is not but)

    return {
        "away": gap(at),
        "away before": gap(0, at),
        "away until the end": gap(at, ended),
        "gap after the end": gap(ended),
        "all answering": NEVER if quiet > client.ended - 0.1 else quiet - at,
        "clients follow": max(t[-1][1] - at if t and t[-1][0] != victim.name else NEVER for t in turns),
        "moves": max(map(len, turns)) - 1,
        "lost": total.lost + (client.lost if client is not total else 0),
        "two": total.longest(2, 99),
        "two anywhere": total.longest(2, 99, on_lan=False),
        "two after the end": total.longest(2, 99, since=ended),
        "none": total.longest(0, 0),
        "none anywhere": total.longest(0, 0, on_lan=False),
        "none before": max([min(b, at) - a for a, b in total.holding(0, 0, since=began) if a < at] + [0]),
        "one after": one_after(total, at),
        "one after the start": one_after(total, began),
        "one after the end": one_after(total, ended),
        "new holder": max(min(found, default=NEVER) - at for found in starts),
        "binders in the end": max(map(len, final), key=lambda count: abs(count - 1)),
        "other binders": max(sum(bool(b) for who, b in one.bound().items() if who != holder.name) for one in each),
        "transitions": lines("ACTIVATED -> |-> ACTIVATED"),
        "changes": lines(" -> "),
        "takes": lines("-> ACTIVATED") / len(each),
        "accusations": lines("taking over its lock|nobody answers for|fell silent"),
        "others' log": lines("^.", but=victim),
    }


# ----------------------------------------------------------------------------------------------------- procedures

Procedure = Callable[[Cluster], Measured]
Act = Callable[[Cluster, Host], Any]  # may return more figures; "at" is when it was complete, if that matters
Wait = float | Callable[[Cluster], float]


def nothing(c: Cluster, host: Host) -> None: ...


def mend(c: Cluster, host: Host) -> None:
    """The fault ends; agents that have ended are started."""
    host.mend()
    c.mend()
    for each in c.among if c.serving else []:
        if not each.alive:
            c.start(each)


def trial(
    act: Act,
    end: Act = mend,
    hold: Wait = Cluster.past_session,
    rest: float = 4,
    interval: float = 0.005,
    standby: bool = False,
    before: Act = nothing,
    who: str = "",
) -> Procedure:
    """Do something to the holder (or the first standby), hold it, end it, rest; the client asks every `interval` s.

    In the end all agents say, as the kernels do, that one of them has each IP: `who` is "same", "other" or "any" of
    them; "" where no agent is to be asked.
    """

    def procedure(c: Cluster) -> Measured:
        holder, others = c.roles()
        victim = others[0] if standby else holder
        before(c, victim)
        c.mark()
        with contextlib.ExitStack() as stack:
            seen = observers(c, interval)
            if c.quick:  # the benchmark's stdout is its table
                stack.callback(lambda: tell(seen[0].result))
            for observer in seen:
                stack.enter_context(observer)
            began = now()
            result = act(c, victim)
            pause(c.wait(hold, 2))
            ended = now()
            end(c, victim)
            last = [c.settled(vip, 20)[0] for vip in c.vips[:4]] if who else []
            pause(c.wait(rest, 0.5))
        more: Measured = result if isinstance(result, dict) else {}
        names = f"{[host.name for host in last]}, was {holder.name}"
        assert who != "same" or set(last) == {holder}, f"moved: {names}"
        assert who != "other" or holder not in last, f"still there: {names}"
        return {**figures(c, seen, began, more.get("at", began), ended, victim, holder), **more}

    return procedure


# faults


def unplug(c: Cluster, host: Host) -> Measured:
    """Pull the cable; the kernel needs its time for that, so it counts from when it is out."""
    host.unplug()
    return {"at": now()}


def fault(name: str) -> Act:
    """One of Host's faults, or a signal to the agent."""
    if name == "unplug":
        return unplug
    return lambda _, host: host.kill(getattr(signal, name)) if name.startswith("SIG") else getattr(host, name)()


kill = fault("power_off")


def set_down(c: Cluster, host: Host) -> None:
    host.ip(f"link set {host.interface} down")
    host.presence.append((now(), False))


def set_up(c: Cluster, host: Host) -> None:
    host.presence.append((now(), True))
    host.ip(f"link set {host.interface} up")
    host.add_address(f"{host.address6}/64")
    wait_until(lambda: c.serves(host), 8)


def nap(c: Cluster, host: Host) -> None:
    """The holder's and the first standby's agents stand still, for less than a session."""
    for each in host, c.roles()[1][0]:
        each.kill(signal.SIGSTOP)
        pause(1.5)
        each.kill(signal.SIGCONT)
        pause(0.5)


def isolate_all(c: Cluster, host: Host) -> None:
    """A switch fails; ZooKeeper is reached by another one."""
    together(*(each.isolate for each in c.hosts))
    pause(max(8, c.span(30)))


def deafen_then_kill(c: Cluster, host: Host) -> Measured:
    """The first standby's LAN dies with its carrier still there; later the holder's host."""
    holder = c.roles()[0]
    host.isolate()
    pause(1)
    died = now()
    holder.power_off()
    return {"at": died}


def stop(c: Cluster, host: Host) -> Measured:
    """SIGTERM, which must end in exit code 0."""
    code, took = host.stop(timeout=30)
    assert code == 0, f"exit code {code}"
    return {"exit": took}


def stop_alone(c: Cluster, host: Host) -> Measured:
    """Nobody can take it: it stays, and the log names it."""
    figures = stop(c, host)
    assert re.search(rf"WARNING.*{c.vips[0]}/32 stays bound", c.news(host)), c.news(host)
    return figures


def stop_two(before: Act) -> Act:
    """The holder and the first standby together, after something else."""

    def act(c: Cluster, host: Host) -> Measured:
        standby = c.roles()[1][0]
        before(c, host)
        pause(0.5)
        return {"exit": max(figures["exit"] for figures in together(partial(stop, c, host), partial(stop, c, standby)))}

    return act


def crash_loop(c: Cluster, host: Host) -> None:
    """Killed and started again after a moment, over and over."""
    until = now() + max(8, c.span(60))
    while now() < until:
        host.stop(signal.SIGKILL)
        pause(0.3)
        c.start(host)
        pause(1.7)


def start_and_listen(c: Cluster, host: Host) -> None:
    """The killed one comes back: the address that it left behind goes, unannounced."""
    new = c.elsewhere(c.vips[0], host)
    with Ear(c.lab.client) as ear:
        c.start(host)
        wait_until(lambda: c.bound(c.vips[0]) == [new], 5, "the leftover address is removed")
    assert {mac for _, _, mac in ear.announcements(c.vips[0])} <= {new.mac}


def lose_zookeeper(c: Cluster, host: Host) -> None:
    """Kill it and wait until every session's time is over."""
    c.zk.stop()
    pause(c.past_session())


def outage(c: Cluster, host: Host) -> None:
    """The same, for longer; /health says so."""
    c.zk.stop()
    pause(max(2 * c.past_session() - 2, c.span(60)))
    assert host.api("GET", "/health")[0] == 503


def back_soon(c: Cluster, host: Host) -> None:
    """ZooKeeper is there again, and so are the agents."""
    c.zk.start()
    c.all_serve(5)


def load(c: Cluster, host: Host) -> None:
    """Two processes that never sleep, at the agents' own priority."""
    inside = ["ip", "netns", "exec", host.namespace]  # the lab ends who is there
    hogs = [c.lab.spawn([*inside, sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    pause(c.span(300))
    for hog in hogs:
        reap(hog)


def hear_no_probe(c: Cluster, host: Host) -> None:
    """Probing is off."""
    with Ear(host.namespace, host.interface) as ear:
        pause(1)
    assert not ear.probes(*c.vips)


# starts


def no_agents(c: Cluster, host: Host) -> None:
    """Hosts that are up, with no agent and no memory."""
    c.reset(0 if c.zk is None else 1, {k: v for k, v in c.config.items() if k != "zookeeper"}, agents=False)
    c.vips = [c.fresh()]


def start_together(c: Cluster, host: Host) -> Measured:
    """Complete when all serve."""
    together(*(partial(c.start_afresh, each, ips=[{"ip": vip} for vip in c.vips]) for each in c.hosts))
    wait_until(lambda: all(re.search(rf"INFO LinK .* on {h.name}", c.news(h)) for h in c.hosts), 15, "all serve")
    return {"at": now()}


def new_ips(c: Cluster, host: Host) -> None:
    """Nobody has them yet."""
    c.vips = [c.fresh() for _ in range(6)] + [c.fresh(6) for _ in range(2)]


def add_together(c: Cluster, host: Host) -> Measured:
    """Each to all three hosts at the same instant."""
    for vip in c.vips:
        together(*(partial(c.add, each, vip=vip) for each in c.hosts))
    return {"at": now()}


# orders


def order(c: Cluster, host: Host, what: str) -> float:
    """POST failover or lock to a host: it must move each IP before the call returns. How long that took."""
    took = 0.0
    for vip in c.vips:
        (holder, others), began = c.settled(vip), now()
        status, body = host.api("POST", f"/ips/{vip}/{what}", timeout=15)
        took = max(took, now() - began)
        assert status == 204, f"{what} on {host.name}: {status} {body}"
        taker = [host] if what == "lock" else others[:1] if c.zk else others
        assert set(taker) & set(c.bound(vip)), f"{what} on {host.name}: 204, but it is not at {taker[0].name}"
        wait_until(lambda v=vip, h=holder: h not in c.bound(v), 0.5, f"{holder.name} lets go")  # type: ignore[misc]
    return took


def failover_twice(c: Cluster, host: Host) -> Measured:
    """The holder gives; so does the next."""
    return {"order to answer": max(order(c, c.roles()[0], "failover") for _ in range(2))}


def lock_there_and_back(c: Cluster, host: Host) -> Measured:
    """The last in the queue takes, then the old holder takes it back."""
    return {"order to answer": max(order(c, taker, "lock") for taker in (c.roles()[1][-1], host))}


def give(c: Cluster, host: Host) -> None:
    """POST failover, with at-most-one: answered in the gap."""
    assert host.api("POST", f"/ips/{c.vips[0]}/failover")[0] == 204


def delete(c: Cluster, host: Host) -> None:
    """The holder no longer shares it."""
    for vip in c.vips:
        assert host.api("DELETE", f"/ips/{vip}")[0] == 204
        c.elsewhere(vip, host, 2)


def add_again(c: Cluster, host: Host) -> None:
    for vip in c.vips:
        c.add(host, vip=vip)


def fail_checks(c: Cluster, host: Host) -> None:
    """The service on the holder goes; the IP does, too."""
    c.services[host].stop()
    for vip in c.vips:
        new = c.elsewhere(vip, host, 20)
        wait_until(lambda v=vip: c.status(host, v) == "FAILING", 1, "FAILING")  # type: ignore[misc]
        wait_until(lambda v=vip, n=new: c.bound(v) == [n], 2, "only the new holder")  # type: ignore[misc]
        assert "8080" in c.show(host, vip)["reason"]


def pass_checks(c: Cluster, host: Host) -> None:
    """The service is back, and the IP stays where it is."""
    c.services[host].start()
    wait_until(lambda: c.status(host, c.vips[0]) == "STANDBY", 4, "STANDBY after recovery")


def fail_all_checks_then_kill(c: Cluster, host: Host) -> Measured:
    """The services behind all checks go: nothing moves. Later the host of whoever has the IP dies."""
    vip = c.vips[0]
    for service in c.services.values():
        service.stop()
    wait_until(lambda: {c.status(each, vip) for each in c.hosts} == {"FAILING"}, 20, "all FAILING")
    pause(max(3, c.span(30)))
    assert c.bound(vip) == [host], "who has seen one check fail is no better, and waits for the next one"
    shown = c.show(host, vip)
    assert shown["bound"] and "checks fail" in shown["reason"], shown
    died = now()
    host.power_off()
    wait_until(lambda: len([each for each in c.bound(vip) if each is not host]) == 1, 6, "another failing one binds it")
    return {"at": died}


# upgrades


def next_version(c: Cluster) -> str:
    """This tree's program as a version of its own; what it says."""
    version = f"9.{random.randrange(10**9)}"
    new = c.program.with_suffix(".new")
    new.write_text(re.sub(r"(?m)^VERSION = .*", f'VERSION = "{version}"', c.source, count=1))
    new.rename(c.program)
    return version


def renew(c: Cluster, version: str, host: Host) -> float:
    """SIGHUP; how long it took until the agent said that it is new, and knew ZooKeeper."""

    def renewed() -> bool:
        pause(0.05)  # not to be a load itself
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(host.api("GET", "/version")[1]["version"] == version)
        return False

    began = now()
    host.kill(signal.SIGHUP)
    wait_until(renewed, 15, f"the new version on {host.name}")
    took = now() - began
    wait_until(lambda: c.serves(host), 5)
    return took


def upgrade(c: Cluster, host: Host) -> Measured:
    """All hosts, one after the other, a standby first."""
    (holder, others), version = c.roles(), next_version(c)
    return {"new version after": max(renew(c, version, each) for each in (others[0], holder, *others[1:]))}


def to_another_ensemble(c: Cluster, host: Host) -> None:
    """All hosts are reloaded, one after the other: without ZooKeeper, the holder last; with the new one, it first."""
    holder, others = c.roles()
    for zookeeper, hosts in (("", (*others, holder)), (f"{c.zk.hosts}/elsewhere", (holder, *others))):
        for each in hosts:
            each.config = {**each.config, "zookeeper": zookeeper}
            each.config_path.write_text(json.dumps(each.config))
            renew(c, next_version(c), each)


# by hand


def bind_by_hand(c: Cluster, host: Host) -> None:
    """What an agent does, without one: the address, and one gratuitous ARP reply (RFC 5227)."""
    host.add_address(f"{c.vips[0]}/32")
    mac, ip = bytes.fromhex(host.mac.replace(":", "")), socket.inet_aton(c.vips[0])
    with lab.socket_in(host.namespace, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((host.interface, 0))
        sock.send(b"\xff" * 6 + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 2) + (mac + ip) * 2)


def isolate_and_bind(c: Cluster, host: Host) -> None:
    """A host dies, and detection and decision cost nothing."""
    host.isolate()
    bind_by_hand(c, c.hosts[1])


def move_by_hand(c: Cluster, host: Host) -> None:
    """New before old."""
    bind_by_hand(c, c.hosts[1])
    host.del_address(f"{c.vips[0]}/32")


# at rest


def idle(c: Cluster) -> Measured:
    """Nothing happens for a minute, and no client asks. The standby is the first, the one that probes."""
    holder, (standby, *_) = c.roles()
    pause(max(2, c.span(12)))  # the announcements after a bind are over
    pair = {"holder": holder, "standby": standby}
    began, before = now(), {role: cost(host) for role, host in pair.items()}
    with contextlib.ExitStack() as stack:
        ports = [*(host.port for host in c.hosts), "pcl", "pzk"]
        ears = [stack.enter_context(Ear(c.lab.switch, port)) for port in ports]
        pause(max(5, c.span(60)))
    took, figures = now() - began, Measured()
    figures["most ARP at a port"] = max(sum(f[12:14] == b"\x08\x06" for _, f in ear.frames) for ear in ears) / took
    for role, host in pair.items():
        (cpu, memory, sent), (old_cpu, _, old_sent) = cost(host), before[role]
        rates = ((cpu - old_cpu) / took * 60, memory, (sent - old_sent) / took)
        figures |= zip((f"{role} CPU", f"{role} RSS", f"{role} sent"), rates, strict=True)
    return figures


def cost(host: Host) -> tuple[float, float, float]:
    """CPU seconds so far and megabytes of the agent and what it has started; packets that its host has sent."""
    assert host.agent
    ticks = pages = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            stat = file.read_text().rpartition(")")[2].split()
            if int(stat[2]) == host.agent.pid:  # its process group
                ticks += int(stat[11]) + int(stat[12])
                pages += int(stat[21])
    link = json.loads(host.ip(f"-j -s link show dev {host.interface}"))[0]
    return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6, link["stats64"]["tx"]["packets"]


# ----------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One scenario: its name, how, what is measured with which bars, how often at --runs 20, and on what.

    Each of `families` is measured on its own in the benchmark, both at once in the suite. `quick` comes to QUICK and
    `config` there; a row with suite=False is a measurement only. The IPs are shared by the first `hosts` hosts.
    """

    name: str
    procedure: Procedure
    figures: tuple[Figure, ...]
    times: int = 20
    zookeeper: int = 1
    networks: int = 1
    families: str = "4"
    ips: int = 1
    hosts: int = 3
    check: bool = False
    agents: bool = True
    suite: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    program: Callable[[], str] | None = None

    @property
    def bar(self) -> str:
        """All bars in words."""
        return "; ".join(figure.bar for figure in self.figures if figure.bar) or "told only"


AWAY, LOST, LOST_TOLD, EXIT = away(), Figure("lost", "probes", 0), Figure("lost", "probes"), Figure("exit")
TWO, TWO_TOLD, NEW_HOLDER = two(0), two(), Figure("new holder")
UNMOVED, UNCHANGED = Figure("transitions", "", 0), Figure("changes", "", 0)
NO_ACCUSING, NO_TRIP = Figure("accusations", "", 0), Figure("takes", "", 1, least=1)
ONE_SOON, ONE_IN_THE_END = Figure("one after", worst=1, once=2), Figure("binders in the end", "", 1, least=1)
NEVER_NONE = (Figure("other binders", "", 0), Figure("none anywhere", worst=0), Figure("transitions", ""))
DEATH = (away(0.35, 0.2, once=1), TWO, ONE_SOON, NEW_HOLDER)
DEATH_ALONE = (away(1, 0.5, once=2), ONE_SOON, two(None, once=1))
DEATH_IN_THE_DARK = (away(median=0.5, once=1.5), ONE_SOON, two(None, once=1))
MANY_DIE = (NEW_HOLDER, Figure("all answering"), TWO)
LEAVE = (LOST, Figure("exit", worst=1), TWO_TOLD, ONE_SOON)
MOVE = (LOST, AWAY, TWO_TOLD, Figure("order to answer"))
RESTART = (LOST, UNCHANGED, Figure("others' log", "lines", 0))
RENEWED = Figure("new version after")
ONE_MS = Figure("two anywhere", worst=0.001)  # the events' order
AT_MOST_ONE = (ONE_MS, Figure("new holder", once=4.5), AWAY)
IDLE = tuple(Figure(f"{role} {name}", unit) for role in ("holder", "standby")
             for name, unit in (("CPU", "s/min"), ("RSS", "MB"), ("sent", "/s")))  # fmt: skip
SPLIT = (away(once=2), Figure("one after the end", worst=1, once=2), two(None, once=2))
SPLIT_SOON = (Figure("new holder", worst=0.35, once=2), *SPLIT, Figure("two after the end"))


def floor(act: Act, hold: float) -> Procedure:
    """What the lab itself costs; the client asks at 1 ms."""

    def prepared(c: Cluster, host: Host) -> None:
        no_agents(c, host)
        bind_by_hand(c, host)

    return trial(act, hold=hold, rest=0, interval=0.001, before=prepared)


fine = partial(trial, rest=0.5, interval=0.001)  # where every lost probe counts
death = trial(kill, hold=3, rest=0.5, who="other")
death_in_the_dark = trial(kill, hold=4, rest=0.5, before=lose_zookeeper, who="other")
starting = trial(start_together, hold=4, rest=0.5, before=no_agents, who="any")
sigterm = fine(stop, hold=1.5, who="other")
failing_over, locking = fine(failover_twice, hold=0, who="any"), fine(lock_there_and_back, hold=0, who="any")
deleting = fine(delete, add_again, hold=1, who="other")
failing = fine(fail_checks, pass_checks, hold=1, who="other")
isolation = trial(fault("isolate"), rest=5, who="other")
OFF_THE_LAN = {"unplug": "its cable is pulled", "isolate": "its switch fails", "deafen": "its NIC hears nothing",
               "mute": "nothing that it sends arrives"}  # fmt: skip
BARE: dict[str, Any] = {"zookeeper": 0, "agents": False, "suite": False}
STRICT = {"promise": "at-most-one"}
BOTH: dict[str, Any] = {"times": 50, "zookeeper": 0, "families": "46"}

ROWS: tuple[Row, ...] = (
    # what the lab costs
    Row("floor: nothing happens for 10 s, client at 1 ms", floor(nothing, 10), (LOST_TOLD, AWAY), **BARE),
    Row("floor: the lab itself moves the IP from a dead host", floor(isolate_and_bind, 1), (AWAY, TWO_TOLD), **BARE),
    Row("floor: the lab itself moves the IP, new before old", floor(move_by_hand, 1), (LOST_TOLD, TWO_TOLD), **BARE),
    # nothing but the wire
    Row("host death, no ZooKeeper", death, DEATH_ALONE, zookeeper=0, families="46"),
    Row("three agents start together, no ZooKeeper; from when all serve", starting,
        (Figure("one after", worst=0.5), two(None, once=1)), times=50, zookeeper=0, agents=False),
    Row("IPs added on three hosts at once, no ZooKeeper",
        trial(add_together, hold=2, rest=1, before=new_ips, who="any"), (ONE_SOON, two(1)), 5, zookeeper=0, ips=0),
    Row("POST lock there and back, no ZooKeeper", locking, MOVE, **BOTH),
    Row("POST failover twice, no ZooKeeper", failing_over, MOVE, **BOTH),
    Row("SIGTERM on the holder, no ZooKeeper", sigterm, LEAVE, 50, zookeeper=0),
    Row("DELETE on the holder, others waiting, no ZooKeeper", deleting, (LOST, TWO_TOLD), 50, zookeeper=0),
    Row("the holder's checks fail, no ZooKeeper", failing, (LOST, TWO_TOLD), 50, zookeeper=0, check=True),
    Row("cable pulled on the holder, no ZooKeeper; healed", trial(unplug, rest=5, who="any"),
        (*SPLIT, gap(0.5, once=0.5)), 5, zookeeper=0, families="46"),
    Row("the holder's switch fails, no ZooKeeper; healed", trial(fault("isolate"), rest=5, who="any"),
        (*SPLIT, gap(1.4, once=1.4)), 5, zookeeper=0, families="46"),
    Row("rolling upgrade from the version before, no ZooKeeper", fine(upgrade, hold=1, who="same"), (LOST, RENEWED), 5,
        zookeeper=0, program=partial(lab.version, BEFORE)),
    Row("at rest, 1 IP, no ZooKeeper", idle, (*IDLE, Figure("most ARP at a port", "/s", 15)), 3, zookeeper=0),
    # a host dies
    Row("host death", death, DEATH, families="46"),
    Row("host death, session_timeout 2", death, (away(3), TWO), config={"session_timeout": 2}, suite=False),
    Row("host death, probing off, session_timeout 2",
        trial(kill, rest=1, before=hear_no_probe, who="other"),
        (Figure("away", worst=3, least=0.5, once=4), TWO), config={"probe_count": 0, "session_timeout": 2}),
    Row("host death, probe_interval 0.01", death, (away(median=0.05, once=1), TWO, NEW_HOLDER),
        config={"probe_interval": 0.01}),
    Row("ZooKeeper dead and then the holder's host dies", death_in_the_dark, DEATH_IN_THE_DARK, families="46"),
    Row("ZooKeeper and the holder's host die together",
        trial(lambda c, host: together(c.zk.stop, host.power_off), rest=0.5, who="other"),
        (Figure("new holder", once=6), TWO, AWAY), 5),
    Row("host death, 100 IPs", trial(kill, hold=5, rest=0.5, interval=0.02, who="other"), MANY_DIE, ips=100),
    Row("host death, 1000 IPs: last bound, all answering",
        trial(kill, nothing, hold=20, rest=0, interval=0.02), MANY_DIE, ips=1000, suite=False),
    # ZooKeeper is in trouble
    Row("ZooKeeper dead for 60 s", trial(outage, back_soon, hold=0, rest=5, who="same"), (LOST, UNCHANGED, TWO)),
    Row("ZooKeeper hangs past the session", trial(lambda c, _: c.zk.pause(), who="any"), (away(0.3), two(1)), 5),
    Row("ZooKeeper loses its data", trial(lambda c, _: c.zk.wipe(), back_soon, hold=0, rest=1, who="same"),
        (LOST, AWAY), 5),
    Row("holder cut off from ZooKeeper only; mended", trial(fault("cut_zookeeper"), who="other"),
        (away(0, once=0.3), Figure("lost", "probes", 0, once=20), two(1), ONE_IN_THE_END)),
    Row("standby cut off from ZooKeeper only; mended", trial(fault("cut_zookeeper"), standby=True, who="same"),
        (LOST, UNCHANGED), 5),
    # the network is in trouble
    Row("cable pulled on the holder, ZooKeeper on the same LAN; healed", trial(unplug, rest=5, who="other"),
        (*SPLIT_SOON, gap(0.2, once=0.5)), families="46"),
    Row("the holder's switch fails, ZooKeeper on the same LAN; healed", isolation, (*SPLIT_SOON, gap(0.2, once=1.4))),
    Row("the holder's switch fails, IPv6; healed", isolation, (*SPLIT_SOON, gap(1.4, once=1.4)), 5, families="6"),
    Row("the holder's interface set down and up", trial(set_down, set_up, hold=3, rest=3, who="other"),
        (away(1), Figure("one after the end", worst=1, once=3)), 5),
    *(Row(f"a standby off the LAN: {words}", trial(fault(name), standby=True, who="same"),
          (NO_ACCUSING, UNMOVED, LOST, TWO)) for name, words in OFF_THE_LAN.items() if name != "mute"),
    *(Row(f"a standby off the LAN that reaches ZooKeeper: {words}", trial(fault(name), standby=True, who="same"),
          (NO_ACCUSING, UNMOVED, away(0.3), two(1)), 5, networks=2) for name, words in OFF_THE_LAN.items()),
    *(Row(f"the holder off the LAN that reaches ZooKeeper: {words}", trial(fault(name), who="any"),
          (NO_TRIP, away(1.5), ONE_IN_THE_END), 5, networks=2)
      for name, words in OFF_THE_LAN.items() if name != "isolate"),
    Row("the first standby's LAN is dead, then the holder's host dies; ZooKeeper on another LAN",
        trial(deafen_then_kill, hold=Cluster.well_past_session, rest=2, standby=True, who="any"),
        (away(5, once=3), NEW_HOLDER), 5, networks=2, quick={"session_timeout": 2, "witnesses": ["10.77.0.200"]},
        config={"witnesses": ["10.77.0.200"]}),  # the client: without a third party nobody can tell who is deaf
    Row("the LAN is dead for everybody for 30 s; ZooKeeper on another LAN",
        trial(isolate_all, hold=0, rest=3, who="same"), NEVER_NONE, 5, networks=2),
    # agents
    Row("three agents start together", starting, (TWO, Figure("one after the start", once=10)), 30, agents=False),
    Row("IPs added on three hosts at once", trial(add_together, hold=1, rest=0.5, before=new_ips, who="any"),
        (TWO, ONE_SOON), 5, ips=0),
    Row("holder's agent SIGSTOPped past its session, then continued", trial(fault("SIGSTOP"), who="other"),
        (away(0.3), Figure("one after the end", worst=1, once=2), TWO_TOLD)),
    Row("agents SIGSTOPped for less than their sessions", trial(nap, hold=0, rest=1, who="same"),
        (LOST, UNCHANGED), 5, quick={"session_timeout": 4}),
    Row("both cores loaded by two busy processes for 5 minutes", trial(load, hold=0, rest=1, who="same"),
        (NO_ACCUSING, UNMOVED, LOST_TOLD), 0, suite=False),
    *(Row(f"SIGKILL and restart after {after} s",
          trial(fault("SIGKILL"), hold=after, rest=7, interval=0.002, who="same"), RESTART,
          families="46", quick={"session_timeout": 4}) for after in (0.1, 1.0)),
    Row("SIGKILL, not restarted: its kernel keeps the IP until the session is over; then started",
        trial(fault("SIGKILL"), start_and_listen, hold=Cluster.well_past_session, rest=1, who="other"),
        (Figure("clients follow", worst=5.5, once=3.5), away(once=0.3), ONE_IN_THE_END), quick={"session_timeout": 2}),
    Row("a crash loop, every 2 s for a minute", trial(crash_loop, hold=2, rest=0.5, interval=0.002, who="same"),
        (Figure("moves", "", 0), LOST, UNCHANGED, TWO_TOLD), quick={"session_timeout": 4}),
    Row("rolling upgrade by SIGHUP", fine(upgrade, hold=2, who="same"), (LOST, UNMOVED, RENEWED)),
    Row("rolling upgrade from the version before", fine(upgrade, hold=2, who="same"), (LOST, RENEWED), 5,
        program=partial(lab.version, BEFORE)),
    Row("all hosts reloaded, one after the other, without ZooKeeper, then with another ensemble",
        fine(to_another_ensemble, hold=2, who="same"), (LOST, UNMOVED, TWO_TOLD), 5, families="46"),
    # orders and stops
    Row("POST failover twice", failing_over, MOVE, 100, families="46"),
    Row("POST lock there and back", locking, MOVE, 100, families="46"),
    Row("DELETE on the holder, others waiting", deleting, (LOST, TWO_TOLD)),
    Row("SIGTERM on the holder", sigterm, LEAVE),
    Row("SIGTERM on the holder, session_timeout 2", sigterm, (away(0.3), LOST_TOLD, EXIT),
        config={"session_timeout": 2}, suite=False),
    Row("SIGTERM on the holder, 100 IPs", trial(stop, hold=2, rest=0.5, interval=0.02, who="other"),
        (LOST, Figure("exit", worst=1, once=2), TWO_TOLD), ips=100),
    Row("SIGTERM on the only host; started again", trial(stop_alone, hold=1, interval=0.001, who="same"),
        (LOST, away(0), Figure("none", worst=0), Figure("exit", once=3)), hosts=1),
    *(Row(f"SIGTERM on two hosts while ZooKeeper is {words}",
          trial(stop_two(act), hold=1, rest=0.5, who="any"), (Figure("exit", worst=11), LOST), 5)
      for words, act in (("dead", lambda c, _: c.zk.stop()), ("hung", lambda c, _: c.zk.pause()),
                         ("black-holed", lambda c, _: [host.cut_zookeeper() for host in c.hosts]))),
    Row("the holder's checks fail, and pass again", failing, (LOST, TWO_TOLD), check=True),
    Row("all hosts' checks fail for 30 s; then the holder's host dies",
        trial(fail_all_checks_then_kill, hold=1, rest=1),
        (Figure("away before", worst=0), Figure("none before", worst=0), two(0, once=1), AWAY, ONE_IN_THE_END),
        check=True, quick={"health_check_fall": 3}),
    # at-most-one
    *(Row(f"at-most-one: {words}",
          trial(fault(name), hold=Cluster.well_past_session, rest=3, interval=0.001, who="any"),
          AT_MOST_ONE, config=STRICT)
      for words, name in (("holder SIGSTOPped, then continued", "SIGSTOP"), ("holder SIGKILLed", "SIGKILL"),
                          ("holder cut off from ZooKeeper, then mended", "cut_zookeeper"),
                          ("holder's host dies", "power_off"))),
    *(Row(f"at-most-one: {words}", trial(act, hold=2, rest=1, who="other"), (ONE_MS, away(1)), 5, config=STRICT)
      for words, act in (("POST failover", give), ("SIGTERM on the holder", stop))),
    # at rest
    Row("at rest, 1 IP", idle, (*IDLE, Figure("most ARP at a port", "/s", 10)), 3),
    Row("at rest, 1000 IPs", idle, IDLE, 3, ips=1000, suite=False),
)  # fmt: skip
