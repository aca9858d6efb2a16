"""Behaviour on a real network with a real ZooKeeper: what an operator or a client of the service would notice."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from lab import (
    CLIENT,
    NOWHERE,
    PROGRAM,
    ZOOKEEPER,
    Host,
    Lab,
    Observer,
    ZooKeeper,
    _reap,
    in_namespace,
    run,
    set_sysctls,
    socket_in,
    wait_until,
)

CHECK = {"type": "TCP", "host": "127.0.0.1", "port": 8080}
CHECKED = {"checks": [CHECK], "healthcheck_interval": 1}
QUICK = {"session_timeout": 2, "health_check_fall": 1, "health_check_timeout": 1}
INF = float("inf")
SESSION = 2.0  # seconds, as QUICK asks

# ------------------------------------------------------------------------------------------------------------ tools


class Ear:
    """Hears every frame that reaches one interface; a context manager."""

    def __init__(self, namespace: str, interface: str = "eth0") -> None:
        self.frames: list[tuple[float, bytes]] = []
        self._sock = socket_in(namespace, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._sock.bind((interface, 3))
        self._sock.settimeout(0.05)
        self._open = True
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Ear:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()
        self._sock.close()

    def _listen(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                frame, address = self._sock.recvfrom(2048)
                if address[2] != socket.PACKET_OUTGOING:
                    self.frames.append((time.monotonic(), frame))

    def announcements(self, vip: str) -> list[tuple[float, str, str]]:
        """(time, "request" or "reply" or "na", hardware address) of each announcement of an address."""
        return [(t, *found) for t, frame in self.frames if (found := _announcement(frame, vip))]

    def probes(self, *vips: str) -> list[tuple[float, str]]:
        """(time, who asked) of each ARP probe for one of these addresses."""
        wanted = {socket.inet_aton(vip) for vip in vips}
        head = b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
        asked = [(t, f) for t, f in self.frames if f[12:22] == head and f[28:32] == bytes(4) and f[38:42] in wanted]
        return [(t, frame[6:12].hex(":")) for t, frame in asked]


def _announcement(frame: bytes, vip: str) -> tuple[str, str] | None:
    if ":" in vip:
        target = socket.inet_pton(socket.AF_INET6, vip)
        if frame[12:14] != b"\x86\xdd" or frame[20] != 58 or frame[54] != 136 or frame[62:78] != target:
            return None
        override, told = frame[58] & 0x20, frame[78:80] == b"\x02\x01"  # and the target's link-layer address
        return ("na", frame[80:86].hex(":")) if frame[0] & 1 and override and told else None
    own = socket.inet_aton(vip)
    if frame[12:14] != b"\x08\x06" or frame[28:32] != own or frame[38:42] != own or not frame[0] & 1:
        return None
    kind = {b"\0\1": "request", b"\0\2": "reply"}[frame[20:22]]
    assert kind == "request" or frame[32:38] == frame[22:28], "the reply form names the sender as its target"
    return kind, frame[22:28].hex(":")


class Service:
    """What a TCP check looks at: a listening socket inside a host; `stop` and `start` it."""

    def __init__(self, host: Host, port: int = CHECK["port"]) -> None:
        self.host, self.port = host, port
        self._sock: socket.socket | None = None

    def start(self) -> Service:
        if self._sock is None:
            self._sock = socket_in(self.host.namespace, socket.AF_INET, socket.SOCK_STREAM)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind(("127.0.0.1", self.port))
            self._sock.listen(128)
        return self

    def stop(self) -> None:
        if self._sock:
            self._sock.close()
            self._sock = None


class ProxyArp(Ear):
    """A router that answers every ARP request for an address, as if it had it."""

    def __init__(self, lab: Lab, vip: str) -> None:
        super().__init__(lab.client)
        self.vip, self.mac = socket.inet_aton(vip), bytes.fromhex(lab.mac(CLIENT).replace(":", ""))

    def _listen(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                frame, address = self._sock.recvfrom(2048)
                asks = frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == self.vip
                if asks and address[2] != socket.PACKET_OUTGOING:
                    self.claim(frame[6:12], frame[28:32])

    def claim(self, to: bytes = b"\xff" * 6, for_ip: bytes = b"") -> None:
        """Say that the address is here."""
        arp = bytes.fromhex("08060001080006040002") + self.mac + self.vip + to + (for_ip or self.vip)
        self._sock.send(to + self.mac + arp)


def together(*actions: Callable[[], Any]) -> list[Any]:
    """Do these at the same time."""
    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(action) for action in actions]]


def alive(host: Host) -> bool:
    return host.agent is not None and host.agent.poll() is None


class Cluster:
    """The lab's three hosts and their agents, as one configuration for all."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.hosts, self.zk = lab, lab.hosts, cast(Any, None)
        self.config: dict[str, Any] = {}
        self.networks = 1
        self.services: list[Service] = []
        self._zookeepers: list[ZooKeeper] = []
        self._last = itertools.count(2)
        self._marks: dict[str, int] = {}

    # between the tests

    def reset(self, zk: ZooKeeper | None, config: dict[str, Any], networks: int = 1) -> Cluster:
        """No fault, no virtual IP, and a running agent with this configuration on every host."""
        self.heal()
        if networks != self.networks:
            self.networks = networks
            self.second_network() if networks == 2 else [host.ip("link", "del", "mgmt0") for host in self.hosts]
            for host in self.hosts:
                _reap(host.agent)
        self.zk = zk
        self.config = {**config, "zookeeper": zk.hosts} if zk else config
        together(*(partial(self._delete, host, False) for host in self.hosts))
        wrong = [host for host in self.hosts if not self._delete(host, True)]
        together(lambda: None, *(partial(self.start_afresh, host) for host in wrong))
        try:
            self.all_serve(6)
        except AssertionError:
            together(*(partial(self.start_afresh, host) for host in self.hosts))
            self.all_serve(20)
        self.mark()
        return self

    def heal(self) -> None:
        """End every fault that a test left behind."""
        for service in self.services:
            service.stop()
        self.services.clear()
        for zk in self._zookeepers:
            self.revive(zk)
        for host in self.hosts:
            if alive(host):
                host.kill(signal.SIGCONT)
            if f'"{host.mac}"' not in host.ip("-j", "link").replace(" ", "") or host.address not in host.ip("addr"):
                self.rewire(host)
            if "unplugged" in host._faults:
                host.plug()
            if host._responder is None or host._responder.poll() is not None:
                host.power_on()
            host.heal()
            with contextlib.suppress(RuntimeError):
                host.mend_zookeeper()

    def rewire(self, host: Host, cut_first: bool = True) -> None:
        """Throw the network card away, and put in a new one."""
        if cut_first:
            with contextlib.suppress(RuntimeError):
                host.ip("link", "del", host.interface)
        veth = f"link add name {host.port} netns {self.lab.switch} type veth peer name {host.interface}"
        run("ip", *veth.split(), "netns", host.namespace, "address", host.mac)
        run("ip", "-n", self.lab.switch, "link", "set", host.port, "master", "br0", "up")
        host.ip("link", "set", host.interface, "up")
        host.add_address(f"{host.address}/24")
        host.add_address(f"{host.address6}/64")

    def second_network(self) -> None:
        """From now on ZooKeeper is reached by a network card of its own."""
        for host in self.hosts:
            n = host.number
            run(*f"ip link add m{n} netns {self.lab.zk} type veth peer name mgmt0 netns {host.namespace}".split())
            zk = f"addr add 172.31.{n}.1/30 dev m{n}\nlink set m{n} up"
            run("ip", "-n", self.lab.zk, "-batch", "-", stdin=zk)
            route = f"route add {self.lab.address(ZOOKEEPER)}/32 via 172.31.{n}.1 src 172.31.{n}.2"
            mine = f"addr add 172.31.{n}.2/30 dev mgmt0\nlink set mgmt0 up\n{route}"
            run("ip", "-n", host.namespace, "-batch", "-", stdin=mine)

    def know(self, zk: ZooKeeper) -> ZooKeeper:
        """Servers to be revived between the tests."""
        self._zookeepers.append(zk)
        return zk

    @staticmethod
    def revive(zk: ZooKeeper) -> None:
        zk.resume()
        dead = [n for n, process in enumerate(zk._processes) if process is None]
        for number in dead:
            zk.start(number)
        if dead:
            zk.wait_ready()

    def _delete(self, host: Host, bound: bool) -> bool:
        """Delete its virtual IPs (in a first round those that it has not bound); whether the agent can go on then."""
        if not alive(host) or host.config != {**self._base(host), **self.config} or host.agent is not self.agents[host]:
            return False
        try:
            found = [ip for ip in host.api("GET", "/ips", timeout=2)[1]["ips"] if bound or not ip["bound"]]
            gone = together(lambda: 204, *(lambda i=ip: host.api("DELETE", f"/ips/{i['id']}")[0] for ip in found))
            return set(gone) == {204} and not (bound and self.strange(host))
        except OSError:
            return False

    agents: dict[Host, Any] = {}  # noqa: RUF012

    @staticmethod
    def _base(host: Host) -> dict[str, Any]:
        state = str(host.directory / "state")
        return {"hostname": host.name, "interface": host.interface, "state_dir": state, "listen": "127.0.0.1:1313"}

    def strange(self, host: Host) -> list[str]:
        """The addresses of a host that are not its own."""
        own = {f"{host.address}/24", f"{host.address6}/64"}
        return [address for address in host.addresses() - own if not address.startswith("fe80:")]

    def start_afresh(self, host: Host, **config: Any) -> Host:
        """Kill the agent, forget what it knew, start it with this configuration."""
        _reap(host.agent)
        shutil.rmtree(host.directory / "state", ignore_errors=True)
        for address in self.strange(host):
            host.del_address(address)
        return self.start(host, **{**self.config, **config})

    def start(self, host: Host, **config: Any) -> Host:
        """Start the agent, as it was configured last if nothing is said."""
        host.start(**(config or host.config))
        self.agents[host] = host.agent
        return host

    def serves(self, host: Host) -> bool:
        """Whether the agent answers, and knows ZooKeeper."""
        with contextlib.suppress(OSError):
            state = host.api("GET", "/health")[1]["zookeeper"]["state"]
            return state == ("connected" if host.config.get("zookeeper") else "none")
        return False

    def restart(self, **config: Any) -> None:
        """All agents afresh, with this beside the usual configuration."""
        together(*(partial(self.start_afresh, host, **config) for host in self.hosts))
        self.all_serve(10)

    def all_serve(self, timeout: float, hosts: Iterable[Host] = ()) -> None:
        wait_until(lambda: all(map(self.serves, hosts or self.hosts)), timeout, "every agent serves")

    # virtual IPs

    def fresh(self, family: int = 4) -> str:
        """An address that no test has used before."""
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
            return (host.api("GET", f"/ips/{vip}")[1] or {}).get("ip", {})
        except OSError:
            return {}

    def ips(self, host: Host) -> list[dict[str, Any]]:
        return host.api("GET", "/ips")[1]["ips"]  # type: ignore[no-any-return]

    def version(self, host: Host) -> str:
        with contextlib.suppress(OSError):
            return str(host.api("GET", "/version")[1]["version"])
        return ""

    def status(self, host: Host, vip: str) -> str:
        return self.show(host, vip).get("status", "")

    def bound(self, vip: str) -> list[Host]:
        """The hosts whose kernel has it."""
        return [host for host in self.hosts if vip in {a.partition("/")[0] for a in host.addresses()}]

    def settled(self, vip: str, timeout: float = 6.0, among: Iterable[Host] = ()) -> tuple[Host, list[Host]]:
        """Wait until exactly one host has it and all agents say so; the holder, and the others in the queue's order."""
        among = list(among) or self.hosts

        def settle() -> Host | None:
            found = [host for host in self.bound(vip) if host in among]
            if len(found) != 1:
                return None
            words = [self.show(host, vip) for host in among if alive(host)]
            states = sorted(ip.get("status", "") for ip in words)
            return found[0] if states == ["ACTIVATED"] + ["STANDBY"] * (len(words) - 1) else None

        holder = wait_until(settle, timeout, f"{vip} settled")
        others = [host for host in among if host is not holder and alive(host)]
        if self.zk:
            queue = lambda: self.show(holder, vip).get("hosts", [])  # noqa: E731
            wait_until(lambda: len(queue()) == len(others) + 1, 3, f"all in the queue for {vip}")
            order = queue()
            others.sort(key=lambda host: order.index(host.name))
        return holder, others

    def held(self, family: int = 4) -> tuple[str, Host, list[Host]]:
        """A new IP on all hosts; its address, its holder, and the others in the queue's order."""
        vip = self.add(vip=self.fresh(family))
        return vip, *self.settled(vip)

    @contextlib.contextmanager
    def watch(
        self,
        vips: str | list[str],
        every: float = 0.005,
        lost: float = INF,
        away: float = INF,
        two: float = INF,
        quiet: bool = False,
    ) -> Iterator[Observer]:
        """Observe, and assert at the end: probes lost, longest outage and overlap in s, no transition at all."""
        self.mark()
        with Observer(self.lab, vips, interval=every) as observer:
            yield observer
        result = observer.result
        for vip in observer.vips[:4]:  # for pytest's report
            one = result.of(vip)
            print(f"---- {vip} answered by {one.holders}\naway {one.gaps}\nbound {one.bound()}")
        assert result.lost <= lost, (result.lost, result.gaps)
        assert result.away <= away, result.gaps
        assert result.two_for()[0] <= two, result.bound()
        changed = [line for vip in observer.vips for line in self.transitions(vip)]
        assert not (quiet and changed), changed

    def both(self) -> tuple[list[str], Host, list[Host]]:
        """Two new IPs, one of each family, with the same holder; the others in the queue's order."""
        vips = [self.fresh(), self.fresh(6)]
        for number, host in enumerate(self.hosts):
            for vip in vips:
                self.add(host, vip=vip)
                if number == 0:
                    self.settled(vip, among=[host])
        self.settled(vips[1])
        return vips, *self.settled(vips[0])

    def elsewhere(self, vip: str, than: Host, timeout: float = 5.0) -> Host:
        """Wait until another host than this one has it; who."""
        return wait_until(lambda: [h for h in self.bound(vip) if h is not than], timeout, f"{vip} elsewhere")[0]

    def move(self, vip: str, holder: Host, how: str, taker: Host) -> tuple[int, Any]:
        return (taker if how == "lock" else holder).api("POST", f"/ips/{vip}/{how}")

    # logs

    def mark(self) -> None:
        """Look at the logs from here on."""
        self._marks = {host.name: len(host.log()) for host in self.hosts}

    def news(self, host: Host) -> str:
        """What the agent has logged since the mark."""
        return host.log()[self._marks.get(host.name, 0) :]

    def transitions(self, vip: str, *hosts: Host) -> list[str]:
        """Every change of state of an IP since the mark."""
        return [
            f"{host.name} {line}"
            for host in hosts or self.hosts
            for line in self.news(host).splitlines()
            if f"vip={vip}/" in line and " -> " in line
        ]

    # the rest of the world

    def service(self, host: Host) -> Service:
        service = Service(host)
        self.services.append(service)
        return service

    def kazoo(self, zk: ZooKeeper | None = None) -> Any:
        """A plain client of kazoo's, inside the lab."""
        from kazoo.client import KazooClient
        from kazoo.handlers.threading import SequentialThreadingHandler

        namespace = self.lab.zk

        class Inside(SequentialThreadingHandler):
            def create_connection(self, *args: Any, **more: Any) -> Any:
                return in_namespace(namespace, partial(super().create_connection, *args, **more))

        client = KazooClient((zk or self.zk).hosts, timeout=10, handler=Inside())
        client.start(10)
        return client


@pytest.fixture(scope="module")
def world() -> Iterator[Cluster]:
    if os.geteuid() or not Path("/usr/share/java/zookeeper.jar").exists():
        pytest.skip("needs root and Debian's zookeeper: sudo ./start.sh test")
    with Lab() as lab:
        run("ip", "-n", lab.client, "route", "add", "10.77.0.0/16", "dev", "eth0")
        yield Cluster(lab)


@pytest.fixture(scope="module")
def server(world: Cluster) -> ZooKeeper:
    return world.know(world.lab.zookeeper(tick=500))


def told(cluster: Cluster) -> None:
    """For pytest's report, if the test fails."""
    for host in cluster.hosts:
        print(f"---- {host.name}\n{cluster.news(host)[-6000:]}")


@pytest.fixture
def c(world: Cluster, server: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts with ZooKeeper."""
    yield world.reset(server, QUICK)
    told(world)


@pytest.fixture
def n(world: Cluster, server: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts that reach ZooKeeper by a network of its own."""
    yield world.reset(server, QUICK, networks=2)
    told(world)


@pytest.fixture
def w(world: Cluster) -> Iterator[Cluster]:
    """Three hosts with nothing but the wire."""
    yield world.reset(None, QUICK)
    told(world)


# -------------------------------------------------------------------------------------- one IP, three hosts, ZooKeeper


def test_the_first_host_binds_at_once(c: Cluster) -> None:
    began = time.monotonic()
    vip = c.add(c.hosts[0])
    assert c.settled(vip, among=c.hosts[:1])[0] is c.hosts[0]
    assert time.monotonic() - began < 2
    assert f"{vip}/32" in c.hosts[0].addresses()


def test_of_three_hosts_that_get_an_ip_together_exactly_one_binds_it(c: Cluster) -> None:
    vips = [c.fresh() for _ in range(8)]
    with c.watch(vips, two=0):
        for vip in vips:
            together(*(partial(c.add, host, vip=vip) for host in c.hosts))
        for vip in vips:
            c.settled(vip)


def test_of_three_agents_that_start_together_exactly_one_binds(c: Cluster) -> None:
    vips = [c.fresh() for _ in range(3)]
    with c.watch(vips, two=0):
        for vip in vips:
            together(*(partial(c.start_afresh, host, ips=[{"ip": vip}]) for host in c.hosts))
            c.settled(vip, 10)


def test_when_the_holders_host_dies_another_one_has_it_in_a_moment(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, away=1, two=0):
        holder.power_off()
        c.settled(vip, among=others)
    holder.power_on()
    c.start(holder)
    wait_until(lambda: c.status(holder, vip) == "STANDBY", 5, "the old holder is a standby")
    assert holder not in c.bound(vip)


def test_a_holder_cut_off_from_zookeeper_keeps_the_ip_until_another_has_it(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, away=0.3, two=1):
        holder.cut_zookeeper()
        c.settled(vip, 10, among=others)
        wait_until(lambda: holder not in c.bound(vip), 2, "the old holder has let go")
        holder.mend_zookeeper()
        wait_until(lambda: c.serves(holder), 5, "back at ZooKeeper")
        c.settled(vip)


def test_a_standby_cut_off_from_zookeeper_changes_nothing(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, quiet=True, lost=0):
        others[0].cut_zookeeper()
        wait_until(lambda: "out of reach" in c.news(others[0]), 5)
        time.sleep(SESSION + 1)
        others[0].mend_zookeeper()
        wait_until(lambda: c.serves(others[0]), 5, "back at ZooKeeper")
        assert c.settled(vip)[0] is holder


def test_with_a_chroot_and_credentials_the_locks_are_there_and_for_nobody_else(c: Cluster) -> None:
    from kazoo.exceptions import NoAuthError

    c.restart(zookeeper=f"{c.zk.hosts}/some/chroot", zookeeper_auth="link:secret")
    vip, holder, others = c.held()
    path = f"/some/chroot/link/ips/{vip}"
    friend, stranger = c.kazoo(), c.kazoo()
    try:
        friend.add_auth("digest", "link:secret")
        nodes = sorted(friend.get_children(path), key=lambda node: node[-10:])
        assert [friend.get(f"{path}/{node}")[0].decode() for node in nodes] == [h.name for h in (holder, *others)]
        for call, *args in (("get_children", path), ("get", f"{path}/{nodes[0]}"), ("delete", f"{path}/{nodes[0]}")):
            with pytest.raises(NoAuthError):
                getattr(stranger, call)(*args)
    finally:
        friend.stop()
        stranger.stop()
    holder.power_off()
    c.settled(vip, among=others)


def test_an_outage_of_zookeeper_longer_than_the_session_changes_nothing(c: Cluster) -> None:
    vip, holder, _ = c.held()
    with c.watch(vip, quiet=True, lost=0) as observer:
        c.zk.stop()
        time.sleep(2 * SESSION + 1)
        assert holder.api("GET", "/health")[0] == 503
        c.revive(c.zk)
        c.all_serve(2)  # a second or so
        assert c.settled(vip)[0] is holder
        time.sleep(0.5)
    assert {host for host, spans in observer.result.bound().items() if spans} == {holder.name}


def test_a_hung_zookeeper_changes_nothing(c: Cluster) -> None:
    vip, _, _ = c.held()
    with c.watch(vip, away=0.3, two=1):
        c.zk.pause()
        time.sleep(SESSION + 2)
        c.zk.resume()
        c.all_serve(5)
        c.settled(vip)


def test_a_server_that_takes_connections_and_says_nothing_is_not_waited_for(c: Cluster) -> None:
    c.restart(session_timeout=4)
    vip, holder, _ = c.held()
    address, port = c.zk.hosts.split(":")
    c.zk.stop()
    with socket_in(c.lab.zk, socket.AF_INET, socket.SOCK_STREAM) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind((address, int(port)))
        silent.listen()
        silent.settimeout(5)
        kept = [silent.accept()[0] for _ in c.hosts]
    c.zk.start()
    c.zk.wait_ready()
    c.all_serve(2)
    for connection in kept:
        connection.close()
    assert c.bound(vip) == [holder] and not [host for host in c.hosts if "session has ended" in c.news(host)]


def test_an_ensemble_that_lost_its_data_changes_nothing(c: Cluster) -> None:
    vip, holder, _ = c.held()
    with c.watch(vip, lost=0):
        c.zk.wipe()
        c.revive(c.zk)
        c.all_serve(5)
        assert c.settled(vip)[0] is holder


def test_a_lock_node_deleted_by_an_operator_leaves_one_holder_and_no_gap(c: Cluster) -> None:
    vip = c.add()
    c.settled(vip)
    client = c.kazoo()
    with c.watch(vip):
        for _ in range(2):
            first = min(client.get_children(f"/link/ips/{vip}"), key=lambda node: node[-10:])
            client.delete(f"/link/ips/{vip}/{first}")
            wait_until(lambda node=first: node not in client.get_children(f"/link/ips/{vip}"))
            wait_until(lambda: len(client.get_children(f"/link/ips/{vip}")) == 3, 3, "three in the queue again")
            c.settled(vip)
    client.stop()


def test_a_deleted_address_is_back_within_a_second_and_announced_and_nothing_moves(c: Cluster) -> None:
    vips = [c.add(), c.add(vip=c.fresh(6))]
    for vip in vips:
        holder, _ = c.settled(vip)
        c.mark()
        with Ear(c.lab.client) as ear:
            holder.del_address(f"{vip}/{128 if ':' in vip else 32}")
            wait_until(lambda vip=vip, holder=holder: c.bound(vip) == [holder], 1, "the address is back")
            kinds = {"na"} if ":" in vip else {"request", "reply"}
            heard = lambda vip=vip, ear=ear: {kind for _, kind, _ in ear.announcements(vip)}  # noqa: E731
            wait_until(lambda heard=heard, kinds=kinds: heard() == kinds, 1, "announced")
        assert not c.transitions(vip)
        assert "removed by somebody else" in c.news(holder)


def test_an_address_that_link_did_not_add_is_never_removed(c: Cluster) -> None:
    host = c.hosts[0]
    assert host.api("POST", "/ips", {"ip": host.address})[0] == 400
    assert host.api("POST", "/ips", {"ip": f"{host.address6}/128"})[0] == 400
    own = c.fresh()
    host.add_address(f"{own}/24")
    wait_until(lambda: host.api("POST", "/ips", {"ip": own})[0] == 400, 1, "refused")
    vip = c.add(host)
    c.settled(vip, among=[host])
    host.add_address(f"{vip}/24")
    assert host.api("DELETE", f"/ips/{vip}")[0] == 204
    assert {f"{vip}/24", f"{own}/24"} < host.addresses()
    assert f"{vip}/32" not in host.addresses()
    for address in vip, own:  # own is the primary one of their subnet: it would take vip with it
        host.del_address(f"{address}/24")


def test_a_failing_check_moves_the_ip_and_its_recovery_does_not_take_it_back(c: Cluster) -> None:
    services = {host: c.service(host).start() for host in c.hosts}
    vip = c.add(**CHECKED)
    holder, _ = c.settled(vip, 10)
    with c.watch(vip, lost=0):
        services[holder].stop()
        new = c.elsewhere(vip, holder)
        wait_until(lambda: c.status(holder, vip) == "FAILING", 1, "FAILING")
        wait_until(lambda: c.bound(vip) == [new], 2, "only the new holder")
        assert "8080" in c.show(holder, vip)["reason"]
        services[holder].start()
        wait_until(lambda: c.status(holder, vip) == "STANDBY", 4, "STANDBY after recovery")
        assert c.settled(vip)[0] is new


@pytest.mark.parametrize("how", ["lock", "failover"])
def test_a_planned_move_is_done_when_the_call_returns(c: Cluster, how: str) -> None:
    vip, holder, others = c.held()
    assert c.move(vip, holder, how, others[1]) == (204, None)
    wait_until(lambda: holder not in c.bound(vip), 0.5, "let go")
    assert others[1 if how == "lock" else 0] in c.bound(vip)
    if how == "lock":
        assert others[1].api("POST", f"/ips/{vip}/lock")[0] == 204, "again is not wrong"
    c.settled(vip)


def test_calls_that_cannot_be_done_are_refused_and_change_nothing(c: Cluster) -> None:
    vip, holder, others = c.held()
    alone = c.add(c.hosts[0])
    c.settled(alone, among=c.hosts[:1])
    sick = c.add(**CHECKED)
    wait_until(lambda: c.status(others[0], sick) == "FAILING", 3, "checks fail")
    c.mark()
    calls = [(others[0], vip, "failover"), (c.hosts[0], alone, "failover")]
    for host, ip, how in [*calls, (others[0], sick, "lock"), (others[0], sick, "failover")]:
        status, answer = host.api("POST", f"/ips/{ip}/{how}")
        assert status == 409, (how, answer)
        assert answer["error"]
        assert answer["detail"]
    assert c.hosts[0].api("POST", "/ips/10.1.2.3/lock") == (404, {"resource": "IP", "error": "not found"})
    others[0].cut_zookeeper()
    wait_until(lambda: "out of reach" in c.news(others[0]), 5)
    for how in "lock", "failover":
        status, answer = others[0].api("POST", f"/ips/{vip}/{how}")
        assert status == 409, (how, answer)
    assert not c.transitions(vip) + c.transitions(alone)
    assert c.bound(vip) == [holder]


def test_a_lock_of_another_program_keeps_link_out_and_lists_our_hosts_in_order(c: Cluster) -> None:
    client = c.kazoo()
    vip = c.fresh()
    lock = client.Lock(f"/link/ips/{vip}", "another program")
    assert lock.acquire(timeout=5)
    for number, host in enumerate(c.hosts):
        c.add(host, vip=vip)
        wait_until(lambda n=number: len(lock.contenders()) == n + 2, 3, "in the queue")
    assert lock.contenders() == ["another program", *(host.name for host in c.hosts)]
    time.sleep(0.5)
    assert not c.bound(vip)
    assert c.hosts[0].api("POST", f"/ips/{vip}/lock")[0] == 409
    assert c.show(c.hosts[1], vip)["holder"] == "another program"
    lock.release()
    assert c.settled(vip, 2)[0] is c.hosts[0]
    assert client.Lock(f"/link/ips/{vip}").contenders() == [host.name for host in c.hosts]
    client.stop()


def test_an_ip_can_be_added_deleted_and_added_again_at_once(c: Cluster) -> None:
    vip = c.add()
    c.settled(vip)
    for host in c.hosts:
        for _ in range(3):
            assert host.api("DELETE", f"/ips/{vip}")[0] == 204
            assert vip not in {address.partition("/")[0] for address in host.addresses()}
            assert host.api("GET", f"/ips/{vip}")[0] == 404
            c.add(host, vip=vip)
    c.settled(vip)
    for host in c.hosts:
        assert host.api("DELETE", f"/ips/{vip}")[0] == 204
    assert not c.bound(vip)


def test_a_delete_on_the_holder_loses_nothing_where_another_host_has_the_ip(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, every=0.001, lost=0):
        assert holder.api("DELETE", f"/ips/{vip}")[0] == 204
        c.settled(vip, among=others)


def test_a_delete_while_zookeeper_is_out_of_reach_does_not_hang(c: Cluster) -> None:
    vip, holder, _ = c.held()
    holder.cut_zookeeper()
    began = time.monotonic()
    assert holder.api("DELETE", f"/ips/{vip}")[0] == 204
    assert time.monotonic() - began < 4
    assert holder not in c.bound(vip)


def test_a_corrupt_state_file_is_set_aside_and_said(c: Cluster) -> None:
    host = c.hosts[0]
    vip = c.add(host)
    _reap(host.agent)
    state = host.directory / "state"
    (state / "ips.json").write_text('{"ips": [{"ip": "10.77.')
    c.start(host, **{**c.config, "ips": [{"ip": vip}]})
    host.wait_log(r"ERROR.*ips.json cannot be read")
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 5, "the configured IP is served")
    assert [path.read_text() for path in state.glob("ips.json.corrupt-*")] == ['{"ips": [{"ip": "10.77.']


@pytest.mark.parametrize("kind", ["a file", "not to be written"])
def test_an_unusable_state_directory_is_said_and_configured_ips_are_served(c: Cluster, kind: str) -> None:
    host, vip = c.hosts[0], c.fresh()
    bad = host.directory / "bad"
    bad.write_text("")
    c.start_afresh(host, state_dir="/proc/link" if kind == "not to be written" else str(bad), ips=[{"ip": vip}])
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 8, "served")
    assert "cannot be written" in c.news(host)
    status, answer = host.api("POST", "/ips", {"ip": c.fresh()})
    assert (status, "cannot be written" in answer["detail"]) == (503, True)
    assert host.stop()[0] == 0


def test_ips_added_by_the_api_survive_a_kill_right_after_the_answer(c: Cluster) -> None:
    host = c.hosts[0]
    vip = c.add(host, **CHECKED)
    host.stop(signal.SIGKILL)
    c.start(host)
    shown = wait_until(lambda: c.show(host, vip), 8, "it is known")
    assert shown["checks"] == [{**CHECK, "path": "/"}]


def test_an_agent_starts_and_serves_with_zookeeper_down(c: Cluster) -> None:
    c.zk.stop()
    host, vip = c.hosts[0], c.fresh()
    c.start_afresh(host, ips=[{"ip": vip}])
    wait_until(lambda: c.show(host, vip), 8, "it serves")
    assert host.api("POST", "/ips", {"ip": c.fresh()})[0] == 201
    wait_until(lambda: c.bound(vip) == [host], 5, "nobody answers for the IP: it is bound")
    c.zk.start()
    wait_until(lambda: c.serves(host), 10, "connected once it is there")
    assert c.bound(vip) == [host]


@pytest.mark.parametrize("same", ["state_dir", "interface"])
def test_a_second_daemon_with_the_same_state_directory_or_interface_refuses_to_start(c: Cluster, same: str) -> None:
    host = c.hosts[0]
    before = dict(host.config)
    vip = c.add(host)
    c.settled(vip, among=[host])
    first = host.agent
    other = {"interface": "lo"} if same == "state_dir" else {"state_dir": str(host.directory / "other")}
    host.start(**{**before, **other, "listen": "127.0.0.1:1314"})
    try:
        assert host.agent and host.agent.wait(10) == 3
        assert "another agent runs" in c.news(host)
    finally:
        host.agent, host.config = first, before
    assert c.bound(vip) == [host]


def test_announcements_have_both_forms_override_and_are_repeated(c: Cluster) -> None:
    host, vips = c.hosts[0], [c.fresh(), c.fresh(6)]
    with Ear(c.lab.client) as ear:
        for vip in vips:
            c.add(host, vip=vip)
        wait_until(lambda: all((h := ear.announcements(vip)) and h[-1][0] - h[0][0] > 0.9 for vip in vips), 3)
        time.sleep(0.05)
    for vip, kinds in (vips[0], {"request", "reply"}), (vips[1], {"na"}):
        heard = ear.announcements(vip)
        assert {mac for _, _, mac in heard} == {host.mac}
        for kind in kinds:
            times = [t - heard[0][0] for t, k, _ in heard if k == kind]
            assert all(any(abs(t - due) < 0.05 for t in times) for due in (0, 0.1, 1)), times


def test_an_ipv6_address_is_bound_like_an_ipv4_address(c: Cluster) -> None:
    vip, holder, others = c.held(6)
    line = next(line for line in holder.ip("addr", "show", "dev", holder.interface).split("inet6 ") if vip in line)
    assert line.startswith(f"{vip}/128")
    assert {"nodad", "deprecated"} < set(line.split())
    assert "preferred_lft 0sec" in line
    assert "valid_lft forever" in line
    with c.watch(vip, away=1, two=0):
        holder.power_off()
        c.settled(vip, among=others)


# ----------------------------------------------------------------------------------------------------- the stop


@pytest.mark.parametrize("state", ["ACTIVATED", "STANDBY", "FAILING"])
def test_sigterm_ends_the_agent_fast_and_another_host_takes_over_at_once(c: Cluster, state: str) -> None:
    vip = c.add(**(CHECKED if state == "FAILING" else {}))
    if state == "FAILING":
        services = [c.service(host).start() for host in c.hosts[1:]]
        c.settled(vip, 8, among=c.hosts[1:])
        assert services
        host = c.hosts[0]
    else:
        holder, others = c.settled(vip)
        host = holder if state == "ACTIVATED" else others[0]
    assert c.status(host, vip) == state
    with c.watch(vip, lost=0):
        code, took = host.stop()
        c.settled(vip, 1, among=[h for h in c.hosts if h is not host])
    assert (code, took < 1) == (0, True), took
    client = c.kazoo()
    assert host.name not in client.Lock(f"/link/ips/{vip}").contenders()
    client.stop()


@pytest.mark.parametrize("fault", ["dead", "hung", "black-holed"])
def test_sigterm_ends_the_agent_within_stop_timeout_whatever_zookeeper_does(c: Cluster, fault: str) -> None:
    c.restart(stop_timeout=4)
    vip, holder, others = c.held()
    with c.watch(vip, lost=0):
        if fault == "dead":
            c.zk.stop()
        elif fault == "hung":
            c.zk.pause()
        else:
            for host in c.hosts:
                host.cut_zookeeper()
        ends = together(holder.stop, others[0].stop)
    assert [code for code, _ in ends] == [0, 0]
    assert max(took for _, took in ends) < 5, ends


@pytest.mark.parametrize("count", [1, 100])
def test_sigterm_on_the_holder_loses_nothing(c: Cluster, count: int) -> None:
    vips = [c.fresh() for _ in range(count)]
    c.restart(ips=[{"ip": vip} for vip in vips])
    holder, others = c.settled(vips[0])
    wait_until(lambda: all(ip["bound"] or ip["holder"] not in (None, holder.name) for ip in c.ips(holder)), 8)
    with c.watch(vips, every=0.001 if count == 1 else 0.05, lost=0):
        code, took = holder.stop()
        wait_until(lambda: len(c.ips(others[0])) == sum(ip["bound"] for h in others for ip in c.ips(h)), 3)
    assert (code, took < 2) == (0, True), took


def test_sigterm_on_the_only_host_leaves_the_ip_bound_and_the_next_start_adopts_it(c: Cluster) -> None:
    host = c.hosts[0]
    vip = c.add(host)
    c.settled(vip, among=[host])
    with c.watch(vip, every=0.001, lost=0) as observer:
        code, took = host.stop()
        assert (code, took < 3) == (0, True), took
        assert re.search(rf"WARNING.*{vip}/32 stays bound", c.news(host))
        c.start(host)
        wait_until(lambda: c.status(host, vip) == "ACTIVATED", 8, "adopted")
    assert observer.result.none_for() == (0, 0)


# ------------------------------------------------------------------------------------------------- never letting go


@pytest.fixture
def d(world: Cluster, server: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts with ZooKeeper and the default session timeout."""
    yield world.reset(server, {**QUICK, "session_timeout": 4})
    told(world)


@pytest.mark.parametrize("family", [4, 6])
def test_planned_moves_there_and_back_lose_nothing(c: Cluster, family: int) -> None:
    vip = c.add(vip=c.fresh(family))
    c.settled(vip)
    with c.watch(vip, every=0.001, lost=0):
        for how in ["lock", "failover"] * 4:
            holder, others = c.settled(vip)
            assert c.move(vip, holder, how, others[1]) == (204, None)


@pytest.mark.parametrize("pause", [0.1, 1.0])
def test_a_killed_agent_that_is_restarted_is_noticed_by_nobody(d: Cluster, pause: float) -> None:
    vips, holder, others = d.both()
    wait_until(lambda: '"ACTIVATED"' in (holder.directory / "state" / "session.json").read_text(), 1)
    time.sleep(0.2)
    with d.watch(vips, every=0.002, lost=0):
        holder.stop(signal.SIGKILL)
        time.sleep(pause)
        d.start(holder)
        wait_until(lambda: d.serves(holder), 5, "it serves again")
        for vip in vips:
            wait_until(lambda vip=vip: d.status(holder, vip) == "ACTIVATED", 3, "adopted")
            assert d.settled(vip)[0] is holder
        time.sleep(1)
    assert not [line for vip in vips for line in d.transitions(vip)]
    assert [d.news(host) for host in others] == ["", ""]


def test_a_killed_agent_that_is_not_restarted_loses_the_ip_after_its_session(c: Cluster) -> None:
    vip, holder, _ = c.held()
    with c.watch(vip, away=0.3) as observer:
        holder.stop(signal.SIGKILL)
        new = c.elsewhere(vip, holder, SESSION + 0.5 + 1)
        time.sleep(1)
    assert observer.result.holders[-1][0] == new.name, "the clients follow"
    assert c.status(new, vip) == "ACTIVATED"
    c.mark()
    with Ear(c.lab.client) as ear:
        c.start(holder)
        wait_until(lambda: c.bound(vip) == [new], 5, "the leftover address is removed at the next start")
    assert {mac for _, mac in [(k, m) for _, k, m in ear.announcements(vip)]} <= {new.mac}
    assert c.settled(vip)[0] is new


def test_a_crash_loop_does_not_make_the_ip_flap(d: Cluster) -> None:
    vip, holder, _ = d.held()
    time.sleep(0.2)
    with d.watch(vip, every=0.002, lost=0, quiet=True):
        for _ in range(4):
            holder.stop(signal.SIGKILL)
            time.sleep(0.3)
            d.start(holder)
            time.sleep(1.7)
        assert d.settled(vip)[0] is holder


def test_a_copied_state_directory_steals_no_session(d: Cluster) -> None:
    vip, holder, others = d.held()
    clone = others[0]
    time.sleep(0.2)
    clone.stop(signal.SIGKILL)
    shutil.rmtree(clone.directory / "state")
    shutil.copytree(holder.directory / "state", clone.directory / "state")
    with d.watch(vip, every=0.002, lost=0):
        d.start(clone)
        wait_until(lambda: d.serves(clone) and "starting afresh" in d.news(clone), 8)
        time.sleep(1)
        assert d.settled(vip)[0] is holder
    assert "ZooKeeper" not in d.news(holder), "its session goes on"
    assert not d.transitions(vip, holder)


def test_an_upgrade_in_place_loses_nothing_and_a_broken_one_is_refused(d: Cluster) -> None:
    vip, more = d.fresh(), d.fresh()
    programs = {host: host.directory / "link.py" for host in d.hosts}
    for host, program in programs.items():
        shutil.copy(PROGRAM, program)
        _reap(host.agent)
        d.start(host, program=program, **{**d.config, "ips": [{"ip": vip}]})
    d.all_serve(10)
    holder, others = d.settled(vip)
    time.sleep(0.2)
    with d.watch(vip, every=0.001, lost=0):
        for host in holder, others[0]:
            text = re.sub(r'^VERSION = ".*"', 'VERSION = "7.0.0"', programs[host].read_text(), flags=re.M)
            programs[host].write_text(text)
            host.kill(signal.SIGHUP)
            wait_until(lambda h=host: d.version(h) == "7.0.0", 8, "the new version answers")
            wait_until(lambda h=host: d.serves(h) and d.show(h, vip)["hosts"], 5)
        good = holder.config_path.read_text()
        broken = [(programs[holder], "def broken(:"), (holder.config_path, '{"interfaces": "eth0"}')]
        for number, (file, text) in enumerate(broken, 1):
            before = file.read_text()
            file.write_text(text)
            holder.kill(signal.SIGHUP)
            wait_until(lambda n=number: d.news(holder).count("going on as before") == n, 5)
            file.write_text(before)
        holder.config_path.write_text(json.dumps({**json.loads(good), "ips": [{"ip": vip}, {"ip": more}]}))
        holder.kill(signal.SIGHUP)
        wait_until(lambda: d.status(holder, more) == "ACTIVATED", 8, "the new configuration counts")
        assert d.settled(vip)[0] is holder
    assert not [line for line in d.transitions(vip) if "ACTIVATED" in line]
    assert alive(holder)
    assert d.status(others[0], vip) == "STANDBY"


@pytest.fixture
def p(world: Cluster, server: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts that take three failed checks for a failure, as by default."""
    yield world.reset(server, {**QUICK, "health_check_fall": 3})
    told(world)


def test_when_all_checks_fail_the_ip_stays_where_it_is_and_survives_that_hosts_death(p: Cluster) -> None:
    c = p
    services = [c.service(host).start() for host in c.hosts]
    vip = c.add(**CHECKED)
    c.settled(vip, 8)
    first = c.bound(vip)
    with c.watch(vip, lost=0, two=0):
        for service in services:
            service.stop()
        wait_until(lambda: [c.status(host, vip) for host in c.hosts] == ["FAILING"] * 3, 5)
        time.sleep(3)
        last = c.bound(vip)
        assert last == first  # who has seen one check fail is no better, and waits for the next one
        shown = c.show(last[0], vip)
        assert (shown["status"], shown["bound"]) == ("FAILING", True)
        assert "checks fail" in shown["reason"]
    with c.watch(vip, two=1):
        last[0].power_off()
        left = [host for host in c.hosts if host is not last[0]]
        wait_until(lambda: len([h for h in c.bound(vip) if h in left]) == 1, 6, "one other failing host binds it")
        time.sleep(1)
        assert len([h for h in c.bound(vip) if h in left]) == 1


def test_an_ip_that_nobody_can_serve_from_the_start_is_bound_by_one_failing_host(c: Cluster) -> None:
    vip = c.add(**CHECKED)
    wait_until(lambda: len(c.bound(vip)) == 1, 6, "bound once")
    time.sleep(1.5)
    assert len(c.bound(vip)) == 1
    assert [c.status(host, vip) for host in c.hosts] == ["FAILING"] * 3


@pytest.fixture
def m(world: Cluster, server: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts that promise at most one."""
    yield world.reset(server, {**QUICK, "promise": "at-most-one"})
    told(world)


@pytest.mark.parametrize("fault", ["stopped", "killed", "cut off", "dead"])
def test_at_most_one_is_never_two_and_has_a_new_holder_after_the_session(m: Cluster, fault: str) -> None:
    vip, holder, _ = m.held()
    faults = {
        "stopped": lambda: holder.kill(signal.SIGSTOP),
        "killed": lambda: holder.kill(signal.SIGKILL),
        "cut off": holder.cut_zookeeper,
        "dead": holder.power_off,
    }
    with m.watch(vip, two=0):
        faults[fault]()
        m.elsewhere(vip, holder, SESSION + 0.5 + 2)
        m.heal()
        time.sleep(1)


@pytest.mark.parametrize("how", ["failover", "sigterm"])
def test_at_most_one_lets_go_first_when_it_moves(m: Cluster, how: str) -> None:
    vip, holder, _ = m.held()
    with m.watch(vip, two=0, away=1):
        if how == "failover":
            assert holder.api("POST", f"/ips/{vip}/failover")[0] == 204
        else:
            assert holder.stop()[0] == 0
        m.elsewhere(vip, holder, 2)


def test_at_most_one_lets_go_while_zookeeper_is_down(m: Cluster) -> None:
    vip = m.add()
    m.settled(vip)
    with m.watch(vip, two=0):
        m.zk.stop()
        wait_until(lambda: not m.bound(vip), SESSION + 1, "nobody has it")
        m.revive(m.zk)
        m.settled(vip)


# ------------------------------------------------------------------------------------------------ the interface


def test_an_interface_that_appears_late_is_waited_for(c: Cluster) -> None:
    host, vip = c.hosts[0], c.fresh()
    _reap(host.agent)
    host.ip("link", "del", host.interface)
    c.start(host, **{**c.config, "ips": [{"ip": vip}]})
    wait_until(lambda: c.status(host, vip) == "FAILING", 5, "it serves without")
    assert "does not exist" in c.show(host, vip)["reason"]
    c.rewire(host, cut_first=False)
    wait_until(lambda: c.bound(vip) == [host], 6, "bound")
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 6, "normal")


def test_an_interface_that_is_made_anew_is_found_by_name(c: Cluster) -> None:
    vip, host = c.fresh(), c.hosts[0]
    c.add(host, vip=vip)
    c.settled(vip, among=[host])
    host.ip("link", "del", host.interface)
    wait_until(lambda: c.status(host, vip) == "FAILING", 2, "no interface")
    with Ear(c.lab.client) as ear:
        c.rewire(host, cut_first=False)
        wait_until(lambda: c.bound(vip) == [host], 6, "bound")
        wait_until(lambda: ear.announcements(vip), 2, "announced")
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 6, "normal")


def test_an_interface_set_down_and_up_has_its_addresses_again_announced(c: Cluster) -> None:
    host, vips = c.hosts[0], [c.fresh(), c.fresh(6)]
    for vip in vips:
        c.add(host, vip=vip)
        c.settled(vip, among=[host])
    host.ip("link", "set", host.interface, "down")
    time.sleep(0.5)
    with Ear(c.lab.client) as ear:
        host.ip("link", "set", host.interface, "up")
        host.add_address(f"{host.address6}/64")
        for vip in vips:
            wait_until(lambda vip=vip: c.bound(vip) == [host], 3, f"{vip} bound")
            wait_until(lambda vip=vip: ear.announcements(vip), 2, f"{vip} announced")


def test_an_interface_set_down_on_the_holder_moves_the_ip_and_up_again_leaves_it(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, away=1):
        holder.ip("link", "set", holder.interface, "down")
        holder.presence.append((time.monotonic(), False))
        new = c.settled(vip, 5, among=others)[0]
        holder.presence.append((time.monotonic(), True))
        holder.ip("link", "set", holder.interface, "up")
        wait_until(lambda: c.bound(vip) == [new], 3, "one binder")
        wait_until(lambda: c.serves(holder), 8)
        assert c.settled(vip)[0] is new


def test_an_agent_that_is_given_another_interface_leaves_nothing_on_the_old_one(n: Cluster) -> None:
    host, before = n.hosts[0], dict(n.hosts[0].config)
    vip = n.add(host)
    n.settled(vip, among=[host])
    host.stop()
    assert n.bound(vip) == [host]
    n.start(host, **{**before, "interface": "mgmt0"})
    wait_until(lambda: f"{vip}/32" in host.ip("-o", "addr", "show", "dev", "mgmt0"), 8, "bound on the new interface")
    assert n.bound(vip) == []
    host.api("DELETE", f"/ips/{vip}")
    host.stop()
    n.start(host, **before)


def test_a_new_hardware_address_is_announced_within_a_second(c: Cluster) -> None:
    host, vips = c.hosts[0], [c.fresh(), c.fresh(6)]
    for vip in vips:
        c.add(host, vip=vip)
        c.settled(vip, among=[host])
    new = "02:4c:00:00:01:01"
    try:
        with Ear(c.lab.client) as ear:
            host.ip("link", "set", host.interface, "address", new)
            for vip in vips:
                wait_until(lambda vip=vip: new in {mac for _, _, mac in ear.announcements(vip)}, 1, "announced")
    finally:
        host.ip("link", "set", host.interface, "address", host.mac)


# ------------------------------------------------------------------------------------------------- an ensemble of three


@pytest.fixture(scope="module")
def ensemble(world: Cluster) -> ZooKeeper:
    return world.know(world.lab.zookeeper(count=3, tick=500))


@pytest.fixture
def e(world: Cluster, ensemble: ZooKeeper) -> Iterator[Cluster]:
    """Three hosts with an ensemble of three."""
    yield world.reset(ensemble, {**QUICK, "session_timeout": 4})
    told(world)


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_the_death_of_one_server_of_the_ensemble_changes_nothing(e: Cluster, role: str) -> None:
    vip, holder, _ = e.held()
    with e.watch(vip, lost=0, quiet=True):
        number = [e.zk.mode(n) for n in range(3)].index(role)
        e.zk.stop(number)
        time.sleep(1)
        e.all_serve(5)
        late = e.add()
        e.settled(late)
    assert e.bound(vip) == [holder]


def test_the_host_of_the_holder_and_the_server_of_the_first_standby_may_die_together(e: Cluster) -> None:
    vip, holder, others = e.held()
    time.sleep(1)
    names = holder.api("GET", f"/ips/{vip}")[1]["ip"]["hosts"]
    second = next(host for host in others if host.name == names[1])
    number = next(n for n in range(3) if f"/{second.address}:" in e.zk.ask("cons", n))
    with e.watch(vip, away=1.0):  # the session is 4 s
        e.zk.pause(number)
        holder.power_off()
        wait_until(lambda: vip + "/32" in second.addresses(), 3, "the first standby has it")
        time.sleep(1)
    e.zk.resume(number)


def test_a_lost_quorum_that_comes_back_changes_nothing(e: Cluster) -> None:
    vip, holder, _ = e.held()
    with e.watch(vip, lost=0, quiet=True):
        for number in 0, 1:
            e.zk.stop(number)
        time.sleep(6)
        assert holder.api("GET", "/health")[0] == 503
        for number in 0, 1:
            e.zk.start(number)
        e.zk.wait_ready()
        e.all_serve(5)
        assert e.settled(vip)[0] is holder


def test_a_black_holed_server_first_in_the_list_costs_no_session(c: Cluster) -> None:
    host, hole = c.hosts[0], c.lab.address(ZOOKEEPER + 1)
    host.ip("neigh", "replace", hole, "lladdr", NOWHERE, "nud", "permanent", "dev", host.interface)
    c.start_afresh(host, zookeeper=f"{hole}:2181,{c.zk.hosts}", ips=[{"ip": (vip := c.fresh())}])
    wait_until(lambda: c.serves(host), 5, "connected to the other server")
    c.settled(vip, among=[host])
    with c.watch(vip, lost=0, quiet=True):
        for _ in range(3):
            c.zk.stop()
            c.revive(c.zk)
            wait_until(lambda: c.serves(host), 4, "connected again")
    host.ip("neigh", "del", hole, "dev", host.interface)


# ----------------------------------------------------------------------------------------------- the second witness


def test_without_zookeeper_three_agents_that_start_together_leave_one_binder(w: Cluster) -> None:
    for _ in range(2):
        vip = w.fresh()
        with w.watch(vip, two=1):
            together(*(partial(w.start_afresh, host, ips=[{"ip": vip}]) for host in w.hosts))
            w.settled(vip, 8)
            time.sleep(1)
        assert len(w.bound(vip)) == 1


def test_without_zookeeper_ips_added_together_have_one_binder_each(w: Cluster) -> None:
    vips = [w.fresh() for _ in range(4)] + [w.fresh(6) for _ in range(2)]
    with w.watch(vips, two=1):
        for vip in vips:
            together(*(partial(w.add, host, vip=vip) for host in w.hosts))
        for vip in vips:
            w.settled(vip)
        time.sleep(1)
    assert all(len(w.bound(vip)) == 1 for vip in vips)


def test_a_second_interface_of_the_holder_on_the_same_lan_is_no_rival(w: Cluster) -> None:
    vip, holder, _ = w.held()
    wire = f"link add second netns {holder.namespace} type veth peer name second-port netns {w.lab.switch}"
    run("ip", *wire.split())
    try:
        set_sysctls(holder.namespace, {"ipv4.conf.all.arp_ignore": 0, "ipv4.conf.second.arp_ignore": 0})
        with Ear(w.lab.client) as ear, w.watch(vip, quiet=True):
            run("ip", "-n", w.lab.switch, "link", "set", "second-port", "master", "br0", "up")
            holder.ip("link", "set", "second", "up")
            mac = bytes.fromhex(holder.ip("-br", "link", "show", "second").split()[2].replace(":", ""))
            run("ip", "-n", w.lab.client, "neigh", "flush", "dev", "eth0")
            wait_until(lambda: any(frame[6:12] == mac for _, frame in ear.frames), 5, "the second one answers, too")
            time.sleep(3)  # the holder looks at the wire, and hears that answer, every 0.4 s
        assert w.show(holder, vip)["conflicts"]["count"] == 0
    finally:
        holder.ip("link", "del", "second")
        set_sysctls(holder.namespace, {"ipv4.conf.all.arp_ignore": 1})


@pytest.mark.parametrize("family", [4, 6])
def test_without_zookeeper_a_dead_host_is_replaced_by_exactly_one(w: Cluster, family: int) -> None:
    vip, holder, others = w.held(family)
    time.sleep(1.2)  # a standby looks once a second
    with w.watch(vip, away=2, two=1):
        holder.power_off()
        w.settled(vip, among=others)
        time.sleep(1)
        new, _ = w.settled(vip, among=others)
    holder.power_on()
    w.start(holder)
    wait_until(lambda: w.status(holder, vip) == "STANDBY", 8, "the old holder comes back as a standby")
    assert w.settled(vip)[0] is new


def test_without_zookeeper_sigterm_and_restart_lose_nothing(w: Cluster) -> None:
    vip, holder, others = w.held()
    with w.watch(vip, lost=0):
        holder.stop(signal.SIGKILL)
        w.start(holder)
        wait_until(lambda: w.status(holder, vip) == "ACTIVATED", 5)
        assert others[0].stop()[0] == 0
        assert w.bound(vip) == [holder]


@pytest.mark.parametrize("fault", ["unplug", "isolate"])
def test_without_zookeeper_a_holder_away_and_back_leaves_one_that_clients_follow(w: Cluster, fault: str) -> None:
    away_and_back(w, fault)


@pytest.mark.parametrize("fault", ["unplug", "isolate"])
def test_a_holder_away_and_back_leaves_one_that_clients_follow(c: Cluster, fault: str) -> None:
    away_and_back(c, fault)


def away_and_back(c: Cluster, fault: str) -> None:
    vips, holder, others = c.both()
    time.sleep(1.2)  # a standby looks once a second
    with c.watch(vips, away=2, two=1):
        getattr(holder, fault)()
        for vip in vips:
            wait_until(lambda vip=vip: set(c.bound(vip)) & set(others), 5, "another has it")
        time.sleep(SESSION + 1)
    # A host that was isolated may have to look up the client anew, and its kernel asks again only after a second
    # (RetransTimer, RFC 4861; neigh/retrans_time_ms): that much is not LinK's.
    with c.watch(vips, away=1.4 if fault == "isolate" else 0.5, two=2):
        holder.heal() if fault == "isolate" else holder.plug()
        for vip in vips:
            wait_until(lambda vip=vip: len(c.bound(vip)) == 1, 2, "one binder")
        time.sleep(0.5)
        for vip in vips:
            c.settled(vip)


def test_with_zookeeper_dead_a_dead_host_is_replaced_by_exactly_one(c: Cluster) -> None:
    vips, holder, others = c.both()
    c.zk.stop()
    time.sleep(SESSION + 1)
    with c.watch(vips, away=1.5, two=1):
        holder.power_off()
        for vip in vips:
            wait_until(lambda vip=vip: set(c.bound(vip)) & set(others), 5, "another has it")
        time.sleep(1)
        assert [len(set(c.bound(vip)) - {holder}) for vip in vips] == [1, 1]
        c.revive(c.zk)
        c.all_serve(5, others)
        for vip in vips:
            c.settled(vip, among=others)


def test_a_host_that_dies_together_with_zookeeper_is_replaced_by_exactly_one(c: Cluster) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, two=1):
        together(c.zk.stop, holder.power_off)
        wait_until(lambda: set(c.bound(vip)) & set(others), 6, "another has it")
        time.sleep(SESSION + 1)
        assert len([host for host in c.bound(vip) if host is not holder]) == 1


def test_an_agent_stopped_beyond_its_session_and_continued_leaves_one_binder(c: Cluster) -> None:
    vip, holder, _ = c.held()
    with c.watch(vip, away=0.3):
        holder.kill(signal.SIGSTOP)
        new = c.elsewhere(vip, holder, SESSION + 3)
        time.sleep(0.5)
        holder.kill(signal.SIGCONT)
        wait_until(lambda: len(c.bound(vip)) == 1, 2, "one binder")
        wait_until(lambda: c.serves(holder), 5)
        assert c.settled(vip)[0] is new


def test_an_agent_stopped_for_less_than_its_session_is_noticed_by_nobody(d: Cluster) -> None:
    vip, holder, others = d.held()
    with d.watch(vip, lost=0, quiet=True):
        for host in holder, others[0]:
            host.kill(signal.SIGSTOP)
            time.sleep(1.5)
            host.kill(signal.SIGCONT)
            time.sleep(0.5)
        assert d.settled(vip)[0] is holder


@pytest.mark.parametrize("fault", ["unplug", "isolate", "deafen"])
def test_a_standby_that_cannot_hear_accuses_nobody(c: Cluster, fault: str) -> None:
    standby_off_the_lan(c, fault)


@pytest.mark.parametrize("fault", ["unplug", "isolate", "deafen", "mute"])
def test_a_standby_that_cannot_hear_but_reaches_zookeeper_accuses_nobody(n: Cluster, fault: str) -> None:
    standby_off_the_lan(n, fault)


def standby_off_the_lan(c: Cluster, fault: str) -> None:
    vip, holder, others = c.held()
    with c.watch(vip, away=0.3, two=1):
        getattr(others[0], fault)()
        time.sleep(SESSION + 1.5)
        others[0].plug() if fault == "unplug" else others[0].heal()
        time.sleep(1)
        wait_until(lambda: c.serves(others[0]), 5)
        assert c.settled(vip)[0] is holder
    assert not c.transitions(vip, holder, others[1])
    assert not [host for host in c.hosts if "fell silent" in c.news(host)]


@pytest.mark.parametrize("fault", ["unplug", "deafen", "mute"])
def test_a_holder_off_the_lan_that_still_reaches_zookeeper_hands_over_once(n: Cluster, fault: str) -> None:
    vip, holder, _ = n.held()
    with n.watch(vip, away=1.5):
        getattr(holder, fault)()
        n.elsewhere(vip, holder)
        time.sleep(3)
        assert len(n.bound(vip)) == 1
        holder.plug() if fault == "unplug" else holder.heal()
        time.sleep(1)
        n.settled(vip)
    taken = [line for line in n.transitions(vip) if "-> ACTIVATED" in line]
    assert len(taken) == 1, "it went once, and not to and fro"


def test_a_proxy_arp_router_neither_hides_a_death_nor_fakes_a_holder(c: Cluster) -> None:
    vip = c.fresh()
    with ProxyArp(c.lab, vip) as router:
        c.add(vip=vip)
        holder, others = c.settled(vip)
        c.mark()
        router.claim()
        time.sleep(1.5)
        assert c.settled(vip)[0] is holder
        assert not c.transitions(vip)
        holder.power_off()
        c.settled(vip, 1.5, among=others)


def test_the_api_shows_what_the_wire_says_and_conflicts_are_counted_and_defended(c: Cluster) -> None:
    vip, holder, others = c.held()
    wire = wait_until(lambda: (w := c.show(others[0], vip)["wire"])["state"] == "answered" and w, 2)
    assert wire["mac"] == holder.mac
    assert wire["since"]
    assert c.show(holder, vip)["conflicts"] == {"count": 0, "mac": None}
    with ProxyArp(c.lab, vip) as rival, Ear(c.lab.client) as ear:
        began = time.monotonic()
        rival.claim()
        wait_until(lambda: [t for t, _, mac in ear.announcements(vip) if t > began and mac == holder.mac], 1, "defence")
    shown = wait_until(lambda: (x := c.show(holder, vip)["conflicts"])["count"] and x, 1)
    assert (shown["count"] >= 1, shown["mac"]) == (True, c.lab.mac(CLIENT))
    assert "also answered for by" in c.news(holder)


@pytest.mark.parametrize("count", [1, 50])
def test_probes_are_one_thin_stream_per_holder_however_many_ips_it_has(c: Cluster, count: int) -> None:
    vips = [c.fresh() for _ in range(count)]
    for host in c.hosts:
        for vip in vips:
            c.add(host, vip=vip)
    for vip in vips:
        c.settled(vip)
    holder, others = c.settled(vips[0])
    assert all(c.bound(vip) == [holder] for vip in vips[::10])
    time.sleep(1)
    with Ear(holder.namespace, holder.interface) as ear, Ear(c.lab.client) as outside:
        time.sleep(3)
    seen = [mac for _, mac in ear.probes(*vips)]
    assert 30 <= seen.count(others[0].mac) <= 25 * 3
    assert seen.count(others[1].mac) <= 2 * 3
    assert len(outside.probes(*vips)) <= 2 * 3 + count, "the others on the LAN are hardly bothered"


def test_with_probing_off_the_session_alone_finds_a_dead_host(c: Cluster) -> None:
    c.restart(probe_count=0)
    vip, holder, others = c.held()
    with Ear(holder.namespace, holder.interface) as ear:
        time.sleep(1)
    assert not ear.probes(vip)
    with c.watch(vip, two=0) as observer:
        holder.power_off()
        c.settled(vip, SESSION + 3, among=others)
    assert 0.5 < observer.result.away < SESSION + 2


@pytest.mark.parametrize("on_fault", ["claim", "hold"])
def test_on_fault_says_what_a_standby_does_without_zookeeper(c: Cluster, on_fault: str) -> None:
    c.restart(on_fault=on_fault)
    vip, holder, others = c.held()
    with c.watch(vip, away=0.3):
        c.zk.stop()
        time.sleep(SESSION + 1)
        claimed = [host for host in others if "fault" in c.news(host)]
        assert bool(claimed) == (on_fault == "claim")
        wait_until(lambda: c.bound(vip), 1, "somebody has it")
    if on_fault == "hold":
        holder.power_off()
        time.sleep(2)
        assert c.bound(vip) == [holder]
        c.revive(c.zk)
        c.settled(vip, 8, among=others)
