"""Behaviour on a real network with a real ZooKeeper: what an operator or a client of the service would notice.

First each row of scenarios.py, once; then what is no row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import (
    CLIENT,
    NOWHERE,
    ZOOKEEPER,
    Ear,
    Host,
    Lab,
    Service,
    in_namespace,
    ip,
    reap,
    run,
    set_sysctls,
    wait_until,
)
from scenarios import CHECK, CHECKED, QUICK, ROWS, Cluster, Row, next_version, renew

SESSION = 2.0  # seconds, as QUICK asks


class ProxyArp(Ear):
    """A router that answers every ARP request for an address, as if it had it."""

    def __init__(self, lab: Lab, vip: str) -> None:
        super().__init__(lab.client)
        self.vip, self.mac = socket.inet_aton(vip), bytes.fromhex(lab.mac(CLIENT).replace(":", ""))

    def heard(self, frame: bytes) -> None:
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == self.vip:
            self.claim(frame[6:12], frame[28:32])

    def claim(self, to: bytes = b"\xff" * 6, for_ip: bytes = b"") -> None:
        """Say that the address is here."""
        arp = bytes.fromhex("08060001080006040002") + self.mac + self.vip + to + (for_ip or self.vip)
        self._sock.send(to + self.mac + arp)


@contextlib.contextmanager
def kazoo(c: Cluster) -> Iterator[Any]:
    """A plain client of kazoo's, inside the lab."""
    from kazoo.client import KazooClient
    from kazoo.handlers.threading import SequentialThreadingHandler

    class Inside(SequentialThreadingHandler):
        def create_connection(self, *args: Any, **more: Any) -> Any:
            return in_namespace(c.lab.zk, partial(super().create_connection, *args, **more))

    client = KazooClient(c.zk.hosts, timeout=10, handler=Inside())
    client.start(10)
    try:
        yield client
    finally:
        client.stop()


@pytest.fixture(scope="module")
def world() -> Iterator[Cluster]:
    if os.geteuid() or not Path("/usr/share/java/zookeeper.jar").exists():
        pytest.skip("needs root and Debian's zookeeper: sudo ./start.sh test")
    with Lab() as lab:
        yield Cluster(lab, shorter=math.inf)


def using(zookeeper: int = 1, networks: int = 1, **config: Any) -> Callable[[Cluster], Iterator[Cluster]]:
    """A fixture: three hosts with so many ZooKeeper servers, which they reach by the LAN or by a network of its own."""

    @pytest.fixture
    def fixture(world: Cluster) -> Iterator[Cluster]:
        yield world.reset(zookeeper, {**QUICK, **config}, networks)
        told(world)

    return fixture


def told(cluster: Cluster) -> None:
    """For pytest's report, if the test fails."""
    for host in cluster.hosts:
        print(f"---- {host.name}\n{cluster.news(host)[-6000:]}")


c, n, w, d = using(), using(networks=2), using(0), using(session_timeout=4)  # d: ZooKeeper's default session
m, e = using(promise="at-most-one"), using(3, session_timeout=4)

# ------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("row", [row for row in ROWS if row.suite], ids=lambda row: row.name)
def test_row(world: Cluster, row: Row) -> None:
    try:
        world.prepare(row, row.families)
        measured = row.procedure(world)
        missed = [f.show(measured[f.name]) for f in row.figures if not f.held([measured[f.name]], once=True)]
        assert not missed, f"{missed}, bar: {row.bar}"
    finally:
        told(world)


def test_rows_are_named_once_and_by_what_they_are() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.match(r"\d|#", name)]


# -------------------------------------------------------------------------------------- one IP, three hosts, ZooKeeper


def test_the_first_host_binds_at_once(c: Cluster) -> None:
    began = time.monotonic()
    host, (vip,) = c.alone()
    assert time.monotonic() - began < 2
    assert f"{vip}/32" in host.addresses()


def test_with_a_chroot_and_credentials_the_locks_are_there_and_for_nobody_else(c: Cluster) -> None:
    from kazoo.exceptions import NoAuthError

    c.restart(zookeeper=f"{c.zk.hosts}/some/chroot", zookeeper_auth="link:secret")
    vip, holder, others = c.held()
    path = f"/some/chroot/link/ips/{vip}"
    with kazoo(c) as friend, kazoo(c) as stranger:
        friend.add_auth("digest", "link:secret")
        nodes = sorted(friend.get_children(path), key=lambda node: node[-10:])
        assert [friend.get(f"{path}/{node}")[0].decode() for node in nodes] == [h.name for h in (holder, *others)]
        for call, *args in (("get_children", path), ("get", f"{path}/{nodes[0]}"), ("delete", f"{path}/{nodes[0]}")):
            with pytest.raises(NoAuthError):
                getattr(stranger, call)(*args)
    holder.power_off()
    c.settled(vip, among=others)


def test_a_server_that_takes_connections_and_says_nothing_is_not_waited_for(c: Cluster) -> None:
    c.restart(session_timeout=4)
    vip, holder, _ = c.held()
    address, port = c.zk.hosts.split(":")
    c.zk.stop()
    with in_namespace(c.lab.zk, lambda: socket.create_server((address, int(port)))) as silent:
        silent.settimeout(5)
        kept = [silent.accept()[0] for _ in c.hosts]
    c.zk.start()
    c.all_serve(2)
    for connection in kept:
        connection.close()
    assert c.bound(vip) == [holder] and not [host for host in c.hosts if "session has ended" in c.news(host)]


def test_a_lock_node_deleted_by_an_operator_leaves_one_holder_and_no_gap(c: Cluster) -> None:
    vip, *_ = c.held()
    with kazoo(c) as client, c.watch(vip):
        for _ in range(2):
            first = min(client.get_children(f"/link/ips/{vip}"), key=lambda node: node[-10:])
            client.delete(f"/link/ips/{vip}/{first}")
            wait_until(lambda node=first: node not in client.get_children(f"/link/ips/{vip}"))
            wait_until(lambda: len(client.get_children(f"/link/ips/{vip}")) == 3, 3, "three in the queue again")
            c.settled(vip)


def test_a_deleted_address_is_back_within_a_second_and_announced_and_nothing_moves(c: Cluster) -> None:
    for vip, kinds in (c.add(), {"request", "reply"}), (c.add(vip=c.fresh(6)), {"na"}):
        holder, _ = c.settled(vip)
        c.mark()
        with Ear(c.lab.client) as ear:
            holder.del_address(f"{vip}/{128 if ':' in vip else 32}")
            wait_until(lambda: c.bound(vip) == [holder], 1, "the address is back")  # noqa: B023
            wait_until(lambda: {kind for _, kind, _ in ear.announcements(vip)} == kinds, 1, "announced")  # noqa: B023
        assert not c.transitions(vip)
        assert "removed by somebody else" in c.news(holder)


def test_an_address_that_link_did_not_add_is_never_removed(c: Cluster) -> None:
    host, own = c.hosts[0], c.fresh()
    assert host.api("POST", "/ips", {"ip": host.address})[0] == 400
    assert host.api("POST", "/ips", {"ip": f"{host.address6}/128"})[0] == 400
    host.add_address(f"{own}/24")
    assert host.api("POST", "/ips", {"ip": own})[0] == 400  # at once
    _, (vip,) = c.alone()
    host.add_address(f"{vip}/24")
    assert host.api("DELETE", f"/ips/{vip}")[0] == 204
    assert {f"{vip}/24", f"{own}/24"} < host.addresses()
    assert f"{vip}/32" not in host.addresses()
    host.del_address(f"{vip}/24", f"{own}/24")  # own is the primary one of their subnet: it would take vip with it


def test_calls_that_cannot_be_done_are_refused_and_change_nothing(c: Cluster) -> None:
    vip, holder, (other, _) = c.held()
    first, (alone,) = c.alone()
    sick = c.add(**CHECKED)
    wait_until(lambda: c.status(other, sick) == "FAILING", 3, "checks fail")
    c.mark()
    calls = [(other, vip, "failover"), (first, alone, "failover"), (other, sick, "lock"), (other, sick, "failover")]
    for host, address, how in calls:
        status, answer = host.api("POST", f"/ips/{address}/{how}")
        assert status == 409 and answer["error"] and answer["detail"], (how, answer)
    assert first.api("POST", "/ips/10.1.2.3/lock") == (404, {"resource": "IP", "error": "not found"})
    other.cut_zookeeper()
    wait_until(lambda: "out of reach" in c.news(other), 5)
    for how in "lock", "failover":
        status, answer = other.api("POST", f"/ips/{vip}/{how}")
        assert status == 409, (how, answer)
    assert not c.transitions(vip, alone)
    assert c.bound(vip) == [holder]


def test_a_lock_of_another_program_keeps_link_out_and_lists_our_hosts_in_order(c: Cluster) -> None:
    vip = c.fresh()
    with kazoo(c) as client:
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


def test_an_ip_can_be_added_deleted_and_added_again_at_once(c: Cluster) -> None:
    vip, *_ = c.held()
    for host in c.hosts:
        for _ in range(3):
            assert host.api("DELETE", f"/ips/{vip}")[0] == 204
            assert vip not in host.bound()
            assert host.api("GET", f"/ips/{vip}")[0] == 404
            c.add(host, vip=vip)
    c.settled(vip)
    assert [host.api("DELETE", f"/ips/{vip}")[0] for host in c.hosts] == [204] * 3
    assert not c.bound(vip)


def test_a_delete_while_zookeeper_is_out_of_reach_does_not_hang(c: Cluster) -> None:
    vip, holder, _ = c.held()
    holder.cut_zookeeper()
    began = time.monotonic()
    assert holder.api("DELETE", f"/ips/{vip}")[0] == 204
    assert time.monotonic() - began < 4
    assert holder not in c.bound(vip)


def test_a_corrupt_state_file_is_set_aside_and_said(c: Cluster) -> None:
    host, vip = c.hosts[0], c.add(c.hosts[0])
    reap(host.agent)
    state, torn = host.directory / "state", '{"ips": [{"ip": "10.77.'
    (state / "ips.json").write_text(torn)
    c.start(host, **{**c.config, "ips": [{"ip": vip}]})
    wait_until(lambda: re.search(r"ERROR.*ips.json cannot be read", c.news(host)), 5, "said")
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 5, "the configured IP is served")
    assert [path.read_text() for path in state.glob("ips.json.corrupt-*")] == [torn]


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
    host, vip = c.hosts[0], c.add(c.hosts[0], **CHECKED)
    host.stop(signal.SIGKILL)
    c.start(host)
    assert wait_until(lambda: c.show(host, vip), 8, "it is known")["checks"] == [{**CHECK, "path": "/"}]


def test_an_agent_starts_and_serves_with_zookeeper_down(c: Cluster) -> None:
    c.zk.stop()
    host, vip = c.hosts[0], c.fresh()
    c.start_afresh(host, ips=[{"ip": vip}])
    wait_until(lambda: c.show(host, vip), 8, "it serves")
    assert host.api("POST", "/ips", {"ip": c.fresh()})[0] == 201
    wait_until(lambda: c.bound(vip) == [host], 5, "nobody answers for the IP: it is bound")
    began = time.monotonic()
    c.zk.start()
    wait_until(lambda: c.serves(host), began + 10 - time.monotonic(), "connected once it is there")
    assert c.bound(vip) == [host]


@pytest.mark.parametrize("same", ["state_dir", "interface"])
def test_a_second_daemon_with_the_same_state_directory_or_interface_refuses_to_start(c: Cluster, same: str) -> None:
    host, (vip,) = c.alone()
    first, before = host.agent, host.config
    other = {"interface": "lo"} if same == "state_dir" else {"state_dir": str(host.directory / "other")}
    host.start(c.program, **{**before, **other, "listen": "127.0.0.1:1314"})
    try:
        assert host.agent and host.agent.wait(10) == 3
        assert "another agent runs" in c.news(host)
    finally:
        host.agent, host.config = first, before
    assert c.bound(vip) == [host]


def test_announcements_have_both_forms_override_and_are_repeated(c: Cluster) -> None:
    with Ear(c.lab.client) as ear:
        host, vips = c.alone(4, 6)
        wait_until(lambda: all((h := ear.announcements(vip)) and h[-1][0] - h[0][0] > 0.9 for vip in vips), 3)
        time.sleep(0.05)
    for vip, kinds in zip(vips, ({"request", "reply"}, {"na"}), strict=True):
        heard = ear.announcements(vip)
        assert {mac for _, _, mac in heard} == {host.mac}
        for kind in kinds:
            times = [t - heard[0][0] for t, k, _ in heard if k == kind]
            assert all(any(abs(t - due) < 0.05 for t in times) for due in (0, 0.1, 1)), times


def test_an_ipv6_address_is_bound_like_an_ipv4_address(c: Cluster) -> None:
    vip, holder, _ = c.held(6)
    line = next(line for line in holder.ip(f"addr show dev {holder.interface}").split("inet6 ") if vip in line)
    assert line.startswith(f"{vip}/128")
    assert {"nodad", "deprecated"} < set(line.split())
    assert "preferred_lft 0sec" in line
    assert "valid_lft forever" in line


# ----------------------------------------------------------------------------------------------------- the stop


@pytest.mark.parametrize("state", ["STANDBY", "FAILING"])
def test_sigterm_ends_an_agent_that_is_no_holder_fast_and_takes_it_out_of_the_queue(c: Cluster, state: str) -> None:
    vip = c.add(**(CHECKED if state == "FAILING" else {}))
    if state == "FAILING":
        c.services = {each: Service(each) for each in c.hosts[1:]}
        c.settled(vip, 8, among=c.hosts[1:])
        host = c.hosts[0]
    else:
        host = c.settled(vip)[1][0]
    assert c.status(host, vip) == state
    with c.watch(vip, lost=0):
        code, took = host.stop()
        c.settled(vip, 1, among=[h for h in c.hosts if h is not host])
    assert (code, took < 1) == (0, True), took
    with kazoo(c) as client:
        assert host.name not in client.Lock(f"/link/ips/{vip}").contenders()


# ------------------------------------------------------------------------------------------------- never letting go


def test_a_copied_state_directory_steals_no_session(d: Cluster) -> None:
    vip, holder, (clone, _) = d.held()
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
    assert not [line for line in d.transitions(vip) if line.startswith(holder.name)]


def test_a_broken_upgrade_is_refused_and_a_new_configuration_counts(d: Cluster) -> None:
    vip, holder, _ = d.held()
    time.sleep(0.2)
    with d.watch(vip, every=0.001, lost=0):
        renew(d, next_version(d), holder)
        good = holder.config_path.read_text()
        broken = [(d.program, "def broken(:"), (holder.config_path, '{"interfaces": "eth0"}')]
        for number, (file, text) in enumerate(broken, 1):
            before = file.read_text()
            file.write_text(text)
            holder.kill(signal.SIGHUP)
            wait_until(lambda n=number: d.news(holder).count("going on as before") == n, 5)
            file.write_text(before)
        more = d.fresh()
        holder.config_path.write_text(json.dumps({**json.loads(good), "ips": [{"ip": more}]}))
        holder.kill(signal.SIGHUP)
        wait_until(lambda: d.status(holder, more) == "ACTIVATED", 8, "the new configuration counts")
        assert d.settled(vip)[0] is holder
    assert not [line for line in d.transitions(vip) if "ACTIVATED" in line]
    assert holder.alive


HANGS = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {directory!r})
import link
turn, hang = link.Agent.turn, Path({hang!r})
link.Agent.turn = lambda self, expected: threading.Event().wait() if hang.exists() else turn(self, expected)
link.os._exit(link.main(sys.argv[1:]))
"""


def test_a_loop_that_hangs_ends_its_process_with_its_stacks_in_the_log(c: Cluster) -> None:
    """kazoo's thread goes on pinging: the lock would be kept for ever, and a take-over by this host never bound."""
    vip, holder, _ = c.held()
    hang, program = holder.directory / "hang", holder.directory / "hangs.py"
    program.write_text(HANGS.format(directory=str(c.program.parent), hang=str(hang)))
    wait_until(lambda: '"ACTIVATED"' in (holder.directory / "state" / "session.json").read_text(), 5, "it is written")
    reap(holder.agent)
    holder.start(program, **holder.config)
    wait_until(lambda: c.status(holder, vip) == "ACTIVATED", 8, "it serves")
    with c.watch(vip, away=0.3):
        hang.touch()
        assert holder.agent and holder.agent.wait(SESSION + 5) == 1
        c.elsewhere(vip, holder, SESSION + 3)
    assert "most recent call first" in c.news(holder) and "hangs.py" in c.news(holder)


def test_an_ip_that_nobody_can_serve_from_the_start_is_bound_by_one_failing_host(c: Cluster) -> None:
    vip = c.add(**CHECKED)
    wait_until(lambda: len(c.bound(vip)) == 1, 6, "bound once")
    time.sleep(1.5)
    assert len(c.bound(vip)) == 1
    assert [c.status(host, vip) for host in c.hosts] == ["FAILING"] * 3


def test_at_most_one_survives_a_crash_and_a_reload_unseen(m: Cluster) -> None:
    m.restart(session_timeout=4)  # of a shorter one the address's lifetime could end first
    vip, holder, _ = m.held()
    with m.watch(vip, every=0.001, lost=0, two=0, quiet=True):
        reap(holder.agent)
        m.start(holder)
        wait_until(lambda: m.serves(holder), 10)
        holder.kill(signal.SIGHUP)
        wait_until(lambda: "reload: executing" in m.news(holder) and m.serves(holder), 10, "the next one serves")
    assert m.bound(vip) == [holder]


def test_at_most_one_lets_go_while_zookeeper_is_down(m: Cluster) -> None:
    vip, *_ = m.held()
    with m.watch(vip, two=0):
        m.zk.stop()
        wait_until(lambda: not m.bound(vip), SESSION + 1, "nobody has it")
        m.zk.start()
        m.settled(vip)


# ------------------------------------------------------------------------------------------------ the interface


def test_an_interface_that_appears_late_is_waited_for(c: Cluster) -> None:
    host, vip = c.hosts[0], c.fresh()
    reap(host.agent)
    host.ip(f"link del {host.interface}")
    c.start(host, **{**c.config, "ips": [{"ip": vip}]})
    wait_until(lambda: c.status(host, vip) == "FAILING", 5, "it serves without")
    assert "does not exist" in c.show(host, vip)["reason"]
    c.rewire(host)
    wait_until(lambda: c.bound(vip) == [host], 6, "bound")
    wait_until(lambda: c.status(host, vip) == "ACTIVATED", 6, "normal")


NEW_MAC = "02:4c:00:00:01:01"


@pytest.mark.parametrize("how, bound, announced", [("made anew", 6, 2), ("down and up", 3, 2), (NEW_MAC, 1, 1)])
def test_an_interface_that_was_changed_has_its_addresses_announced(
    c: Cluster, how: str, bound: float, announced: float
) -> None:
    host, vips = c.alone(4, 6)
    if how == "made anew":
        host.ip(f"link del {host.interface}")
        wait_until(lambda: c.status(host, vips[0]) == "FAILING", 2, "no interface")
    elif how == "down and up":
        host.ip(f"link set {host.interface} down")
        time.sleep(0.5)
    with Ear(c.lab.client) as ear:
        if how == "made anew":
            c.rewire(host)
        elif how == "down and up":
            host.ip(f"link set {host.interface} up")
            host.add_address(f"{host.address6}/64")
        else:
            host.ip(f"link set {host.interface} address {NEW_MAC}")
        mac = NEW_MAC if how == NEW_MAC else host.mac
        for vip in vips:
            wait_until(lambda vip=vip: c.bound(vip) == [host], bound, f"{vip} bound")
            wait_until(lambda vip=vip: mac in {m for _, _, m in ear.announcements(vip)}, announced, f"{vip} announced")
    wait_until(lambda: c.status(host, vips[0]) == "ACTIVATED", 6, "normal")


def test_an_agent_that_is_given_another_interface_leaves_nothing_on_the_old_one(n: Cluster) -> None:
    host, (vip,) = n.alone()
    host.stop()
    assert n.bound(vip) == [host]
    n.start(host, **{**host.config, "interface": "mgmt0"})
    wait_until(lambda: f"{vip}/32" in host.ip("-o addr show dev mgmt0"), 8, "bound on the new interface")
    assert n.bound(vip) == []
    host.api("DELETE", f"/ips/{vip}")


# ------------------------------------------------------------------------------------------------- an ensemble of three


@pytest.mark.parametrize("role", ["follower", "leader"])
def test_the_death_of_one_server_of_the_ensemble_changes_nothing(e: Cluster, role: str) -> None:
    vip, holder, _ = e.held()
    with e.watch(vip, lost=0, quiet=True):
        e.zk.stop([e.zk.mode(n) for n in range(3)].index(role))
        time.sleep(1)
        e.all_serve(5)
        e.held()
    assert e.bound(vip) == [holder]


def test_at_most_one_rides_out_a_follower_of_the_ensemble_that_falls_silent(e: Cluster) -> None:
    def on_a_follower() -> list[tuple[Host, int]]:
        e.restart(promise="at-most-one")
        followers = [n for n in range(3) if e.zk.mode(n) == "follower"]
        return [(host, n) for host in e.hosts for n in followers if f"/{host.address}:" in e.zk.ask("cons", n)]

    holder, number = wait_until(on_a_follower, 60, "a host that talks to a follower")[0]
    vip = e.add(holder)
    e.settled(vip, among=[holder])
    e.add(*(host for host in e.hosts if host is not holder), vip=vip)
    e.settled(vip)
    with e.watch(vip, lost=0, quiet=True):
        e.zk.pause(number)
        time.sleep(5)  # the session would have ended, and the address's lifetime long before
    assert e.bound(vip) == [holder] and "trying another one" in e.news(holder)


def test_the_host_of_the_holder_and_the_server_of_the_first_standby_may_die_together(e: Cluster) -> None:
    vip, holder, (second, _) = e.held()
    time.sleep(1)
    number = next(n for n in range(3) if f"/{second.address}:" in e.zk.ask("cons", n))
    with e.watch(vip, away=1.0):  # the session is 4 s
        e.zk.pause(number)
        holder.power_off()
        wait_until(lambda: vip + "/32" in second.addresses(), 3, "the first standby has it")
        time.sleep(1)


def test_a_lost_quorum_that_comes_back_changes_nothing(e: Cluster) -> None:
    vip, holder, _ = e.held()
    with e.watch(vip, lost=0, quiet=True):
        e.zk.stop(0, 1)
        time.sleep(6)
        assert holder.api("GET", "/health")[0] == 503
        e.zk.start()
        e.all_serve(5)
        assert e.settled(vip)[0] is holder


def test_a_black_holed_server_first_in_the_list_costs_no_session(c: Cluster) -> None:
    host, hole, vip = c.hosts[0], c.lab.address(ZOOKEEPER + 1), c.fresh()
    host.ip(f"neigh replace {hole} lladdr {NOWHERE} nud permanent dev {host.interface}")
    c.start_afresh(host, zookeeper=f"{hole}:2181,{c.zk.hosts}", ips=[{"ip": vip}])
    wait_until(lambda: c.serves(host), 5, "connected to the other server")
    c.settled(vip, among=[host])
    with c.watch(vip, lost=0, quiet=True):
        for _ in range(3):
            c.zk.stop()
            c.zk.start()
            wait_until(lambda: c.serves(host), 4, "connected again")


# ----------------------------------------------------------------------------------------------- the second witness


def test_a_second_interface_of_the_holder_on_the_same_lan_is_no_rival(w: Cluster) -> None:
    vip, holder, _ = w.held()
    ip(holder.namespace, f"link add second type veth peer name second-port netns {w.lab.switch}")
    try:
        set_sysctls(holder.namespace, {"ipv4.conf.all.arp_ignore": 0, "ipv4.conf.second.arp_ignore": 0})
        with Ear(w.lab.client) as ear, w.watch(vip, quiet=True):
            ip(w.lab.switch, "link set second-port master br0 up")
            holder.ip("link set second up")
            mac = bytes.fromhex(holder.ip("-br link show second").split()[2].replace(":", ""))
            ip(w.lab.client, "neigh flush dev eth0")
            wait_until(lambda: any(frame[6:12] == mac for _, frame in ear.frames), 5, "the second one answers, too")
            time.sleep(3)  # the holder looks at the wire, and hears that answer, every 0.4 s
        assert w.show(holder, vip)["conflicts"]["count"] == 0
    finally:
        holder.ip("link del second")
        set_sysctls(holder.namespace, {"ipv4.conf.all.arp_ignore": 1})


def test_without_zookeeper_sigterm_and_restart_lose_nothing(w: Cluster) -> None:
    vip, holder, (other, _) = w.held()
    with w.watch(vip, lost=0):
        holder.stop(signal.SIGKILL)
        w.start(holder)
        wait_until(lambda: w.status(holder, vip) == "ACTIVATED", 5)
        assert other.stop()[0] == 0
        assert w.bound(vip) == [holder]


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


def test_without_zookeeper_a_router_that_answers_each_announcement_moves_nothing(w: Cluster) -> None:
    """Linux as a router with proxy ARP: it answers no probe, but whoever announces what it has another route to."""
    vip, router, mac = w.fresh(), w.lab.zk, bytes.fromhex(w.lab.mac(ZOOKEEPER).replace(":", ""))
    try:
        ip(router, "link add away type veth peer name gone", "link set gone up", "link set away up")
        ip(router, f"route add {vip}/32 dev away")
        set_sysctls(router, {"ipv4.ip_forward": 1, "ipv4.conf.all.proxy_arp": 1})
        w.add(vip=vip)
        holder, _ = w.settled(vip)
        w.mark()
        with Ear(holder.namespace, holder.interface) as ear:
            answers = lambda: [time for time, frame in ear.frames if frame[6:12] == mac and frame[20:22] == b"\0\2"]  # noqa: E731
            holder.ip(f"addr del {vip}/32 dev {holder.interface}")  # it is bound and announced anew
            wait_until(lambda: (heard := answers()) and heard[-1] > heard[0] + 4, 10, "some announcements are answered")
        assert w.settled(vip)[0] is holder
        assert not w.transitions(vip)
    finally:
        set_sysctls(router, {"ipv4.ip_forward": 0, "ipv4.conf.all.proxy_arp": 0})
        ip(router, "link del away")


FILTER = """table arp answers {
  chain out {
    type filter hook output priority 0
    arp operation reply drop
  }
}"""


def test_a_holder_whose_answers_are_filtered_is_told_of_by_the_first_standby_and_keeps_the_ip(c: Cluster) -> None:
    vip, holder, (first, *_) = c.held()
    first.stop(signal.SIGKILL)  # who was answered before takes it over
    nft = ["ip", "netns", "exec", holder.namespace, "nft"]
    subprocess.run([*nft, "-f", "-"], input=FILTER.encode(), check=True)
    try:
        c.start(first)
        wait_until(lambda: c.show(first, vip).get("wire", {}).get("state") == "silent", 30, "the first standby tells")
        assert c.bound(vip) == [holder]
    finally:
        subprocess.run([*nft, "delete", "table", "arp", "answers"], check=True)
    wait_until(lambda: c.show(first, vip)["wire"]["state"] == "answered", 5)
    assert c.bound(vip) == [holder]


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
        # a second after it was bound it is no longer who let go for us
        wait_until(lambda: rival.claim() or c.show(holder, vip)["conflicts"]["count"], 2, "a conflict")
        assert c.show(holder, vip)["conflicts"] == {"count": 1, "mac": c.lab.mac(CLIENT)}
    assert "also answered for by" in c.news(holder)


def test_who_posts_an_address_that_a_stranger_has_is_warned_with_the_strangers_mac(c: Cluster) -> None:
    vip = c.fresh()
    ip(c.lab.client, f"addr add {vip}/32 dev eth0")  # a printer's
    try:
        c.add(c.hosts[0], vip=vip)
        wait_until(lambda: f"answered for by {c.lab.mac(CLIENT)}: remove it there" in c.news(c.hosts[0]), 3, "warned")
    finally:
        ip(c.lab.client, f"addr del {vip}/32 dev eth0")


@contextlib.contextmanager
def stalling(c: Cluster, host: Host) -> Iterator[Callable[[str], None]]:
    """Its agent started with a stderr that nobody reads any more, its state on a disk that `-f` stalls until `-u`."""
    state, image, fifo = host.directory / "state", host.directory / "disk", host.directory / "stderr"
    with image.open("wb") as file:
        file.truncate(1 << 24)
    run("mkfs.ext4", "-q", str(image))
    os.mkfifo(fifo)
    pipe, log = os.open(fifo, os.O_RDWR | os.O_NONBLOCK), host.log_path
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe, bytes(4096)):
            pass
    reap(host.agent)
    run("mount", "-o", "loop", str(image), str(state))
    try:
        host.log_path = fifo
        c.start_afresh(host)
        host.log_path = log
        yield lambda how: run("fsfreeze", how, str(state))
    finally:
        subprocess.run(["fsfreeze", "-u", str(state)], check=False, capture_output=True)
        reap(host.agent)
        run("umount", "-l", str(state))
        os.close(pipe), fifo.unlink(), image.unlink()


@pytest.mark.parametrize("promise", ["at-least-one", "at-most-one"])
def test_a_disk_that_stalls_for_three_seconds_and_a_blocked_stderr_stop_no_agent(world: Cluster, promise: str) -> None:
    c = world.reset(1, {**QUICK, "promise": promise})
    pair = c.hosts[:2]
    with contextlib.ExitStack() as stack:
        freeze = {host: stack.enter_context(stalling(c, host)) for host in pair}
        c.all_serve(10)
        wait_until(lambda: all(host.api("GET", "/health")[0] == 200 for host in pair), 10, "no earlier boot is left")
        vip = c.add(*pair)
        holder, (other,) = c.settled(vip, among=pair)
        with c.watch(vip, lost=0, two=0):
            for host in pair:
                freeze[host]("-f")
                ends = time.monotonic() + 3
                with ThreadPoolExecutor(1) as pool:
                    added = pool.submit(host.api, "POST", "/ips", {"ip": c.fresh()})
                    while time.monotonic() < ends:
                        health = host.api("GET", "/health", timeout=1)
                        assert health[0] == 200, str(health)
                        time.sleep(0.1)
                    assert not added.done(), "it is durable before it is answered"
                    freeze[host]("-u")
                    assert added.result()[0] == 201
            assert c.bound(vip) == [holder]
        with c.watch(vip, two=0, away=SESSION + 1):
            freeze[other]("-f")
            holder.power_off()
            c.elsewhere(vip, than=holder)
            freeze[other]("-u")


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
    seen = ear.probes(*vips)
    assert 15 <= seen.count(others[0].mac) <= 10 * 3
    assert seen.count(others[1].mac) <= 2 * 3
    assert len(outside.probes(*vips)) <= 2 * 3 + count, "the others on the LAN are hardly bothered"
