"""From a running keepalived to LinK and back, with a client that asks every 5 ms: README, "Coming from keepalived"."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from lab import Host, Lab, wait_until
from scenarios import NEVER, QUICK, Cluster

INSTANCE = """vrrp_instance VI_{number} {{
    state BACKUP
    interface {interface}
    virtual_router_id {number}
    priority {priority}
    advert_int 1
    virtual_ipaddress {{
        {vip}/32
    }}
}}
"""
VIPS = ["10.77.0.120", "10.77.0.121"]


class Keepalived:
    """keepalived on the first two hosts, each the master of one of two instances."""

    def __init__(self, c: Cluster) -> None:
        self._c, self._running = c, dict[Host, subprocess.Popen[bytes]]()

    def start(self) -> None:
        """Start it, and wait until each IP has its master."""
        for host in self._c.hosts[:2]:
            where, text = host.directory, "global_defs {\n    vrrp_garp_master_delay 1\n}\n"
            for number, vip in enumerate(VIPS, 1):
                priority = 150 if number == host.number else 100
                text += INSTANCE.format(number=number, interface=host.interface, priority=priority, vip=vip)
            (where / "keepalived.conf").write_text(text)
            pids = [f"--{kind}={where}/{kind}" for kind in ("pid", "vrrp_pid", "checkers_pid")]
            command = ["keepalived", "--dont-fork", "--log-console", f"--use-file={where}/keepalived.conf", *pids]
            inside = ["ip", "netns", "exec", host.namespace, *command]
            self._running[host] = self._c.lab.spawn(inside, where / "keepalived.log")
        masters = list(zip(VIPS, self._c.hosts, strict=False))
        wait_until(lambda: all(vip in host.bound() for vip, host in masters), 15, "each instance has its master")

    def stop(self) -> None:
        """As systemctl stop does it."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait(10)


@pytest.fixture
def c() -> Iterator[Cluster]:
    if not shutil.which("keepalived"):
        pytest.skip("NOT TESTED: keepalived is not installed")
    with Lab() as lab:
        yield Cluster(lab)


@pytest.mark.parametrize(("zookeeper", "lost", "away"), [(1, 0, 0.05), (0, NEVER, 0.35)], ids=["ZooKeeper", "none"])
def test_both_ips_of_a_keepalived_come_to_link_and_go_back(
    c: Cluster, zookeeper: int, lost: float, away: float
) -> None:
    """Without ZooKeeper nobody takes what keepalived answers for: the IP is silent until LinK does, as in a crash."""
    keepalived = Keepalived(c)
    c.reset(zookeeper, dict(QUICK))
    masters, other = c.hosts[:2], c.hosts[2]
    keepalived.start()
    time.sleep(2)  # its second announcements, a second after the first ones
    with c.watch(*VIPS, lost=lost, away=away):
        for vip in VIPS:
            c.add(other, vip=vip)
            wait_until(lambda vip=vip: c.show(other, vip)["wire"]["state"] == "answered", 5, "keepalived is heard")
            assert c.bound(vip) == [masters[VIPS.index(vip)]], "what somebody answers for is not taken"
            if zookeeper:
                assert other.api("POST", f"/ips/{vip}/lock")[0] == 204
        keepalived.stop()
        for vip in VIPS:
            c.elsewhere(vip, masters[0])
            c.add(*masters, vip=vip)
        assert {c.settled(vip)[0] for vip in VIPS} == {other}
    with c.watch(*VIPS, lost=0):
        for host in [*masters, other]:  # who has them is the last to stop, and keeps them
            assert host.stop()[0] == 0
        keepalived.start()
        other.del_address(*(f"{vip}/32" for vip in VIPS))
        time.sleep(2)
    keepalived.stop()
