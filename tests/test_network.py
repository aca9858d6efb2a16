"""Network against the kernel: two hosts and a switch in network namespaces of their own. Needs root.

What this kernel cannot make (bonds, VRFs, VLAN interfaces) is skipped, and told from made-up answers instead.
"""

import contextlib
import errno
import ipaddress
import itertools
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import link
from lab import in_namespace, ip, run, set_sysctls, socket_in
from link import Kind

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
A, B, SWITCH = (f"h2ns{os.getpid()}{part}" for part in "abs")
MAC_A, MAC_B = bytes.fromhex("02000000aa01"), bytes.fromhex("02000000aa02")
VIP4, VIP6 = ipaddress.ip_interface("10.0.0.100/32"), ipaddress.ip_interface("fd77::100/128")


def can(namespace: str, *lines: str) -> bool:
    with contextlib.suppress(RuntimeError):
        return ip(namespace, *lines) is not None
    return False


class Host:
    """A host of the LAN: its Network, used inside its namespace, and a raw socket for any frame."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.network = self.inside(lambda: link.Network("eth0"))

    def inside(self, action: Callable[[], Any]) -> Any:
        return in_namespace(self.namespace, action)

    def sync(self, listen: bool = True) -> Any:
        return self.inside(lambda: self.network.sync(listen))

    def hear(self, wait: float = 0.1, limit: int = 512) -> list[link.Heard]:
        time.sleep(wait)
        return self.network.receive(limit)[0]


@pytest.fixture
def lan() -> Iterator[tuple[Host, Host]]:
    for namespace in (A, B, SWITCH):
        run("ip", "netns", "add", namespace)
    try:
        ip(SWITCH, "link add br0 type bridge mcast_snooping 0", "link set br0 up")
        for number, namespace in enumerate((A, B), 1):
            port = f"link add eth0 address 02:00:00:00:aa:0{number} type veth peer name port{number} netns {SWITCH}"
            ip(namespace, port, "link set lo up")
            ip(SWITCH, f"link set port{number} master br0", f"link set port{number} up")
            set_sysctls(namespace, {f"ipv6.conf.{name}.accept_dad": 0 for name in ("all", "default", "eth0")})
            ip(namespace, "link set eth0 up", f"addr add 10.0.0.{number}/24 dev eth0")
            ip(namespace, f"addr add fd77::{number}/64 dev eth0 nodad")
        yield Host(A), Host(B)
    finally:
        for namespace in (A, B, SWITCH):
            run("ip", "netns", "del", namespace)


@pytest.fixture
def one(lan: tuple[Host, Host]) -> Host:
    return lan[0]


# ---------------------------------------------------------------------------------------- the link and its addresses


def test_addresses_are_bound_reported_with_their_prefix_and_unbound(one):
    state, addresses, own = one.sync()
    assert state == link.Link(state.number, MAC_A, True, True, "", "", "") and state.number
    one.network.add(VIP4), one.network.add(VIP6, lifetime=30)
    assert one.network.ready(VIP4) and (time.sleep(0.05), one.network.ready(VIP6))[1]
    assert not one.network.ready(ipaddress.ip_interface("fd77::101/128"))
    _, now, _ = one.sync()
    assert now == {**addresses, VIP4: True, VIP6: True} and own == {4: "10.0.0.1", 6: "fe80::ff:fe00:aa01"}
    assert {str(a) for a in addresses} == {"10.0.0.1/24", "fd77::1/64", "fe80::ff:fe00:aa01/64"}
    for _ in range(2):
        one.network.remove(VIP4), one.network.remove(VIP6)
    assert one.sync()[1] == addresses and not any(addresses.values())


def test_an_address_of_the_host_with_another_prefix_length_is_the_hosts_own(one):
    ip(A, "addr add 10.0.0.100/24 dev eth0")
    assert one.sync()[1][ipaddress.ip_interface("10.0.0.100/24")] is False


def test_our_addresses_are_cleared_from_other_interfaces_and_only_the_given_ones(one):
    one.sync(), ip(A, "link add x0 type bridge", "link set x0 up", "addr add 10.0.0.101/32 dev x0")
    other, mine = one.inside(lambda: link.Network("x0")), [VIP4, VIP6, ipaddress.ip_interface("10.0.0.102/32")]
    one.inside(other.sync)
    for address in mine:
        one.network.add(address), other.add(address)
    for _ in range(2):
        one.network.clear([VIP4, VIP6, ipaddress.ip_interface("10.0.0.101/32")])
    left = re.findall(r"inet ([\d./]+)", ip(A, "addr show dev x0"))
    assert sorted(left) == ["10.0.0.101/32", "10.0.0.102/32"] and set(mine) <= set(one.sync()[1])


def test_of_our_addresses_those_that_the_kernel_will_not_end_can_be_cleared_here_too(one):
    one.sync(), one.network.add(VIP4), one.network.add(VIP6, lifetime=30)
    one.network.clear([VIP4, VIP6], lasting=True)
    assert [ip for ip, ours in one.sync()[1].items() if ours] == [VIP6]


@pytest.mark.parametrize("kind, trouble", [("bridge", True), ("bond", True), ("vrf table 10", False)])
def test_a_port_of_a_bridge_or_a_bond_names_it(one, kind, trouble):
    if not can(A, f"link add m0 type {kind}"):
        pytest.skip(f"this kernel has no {kind.split()[0]}")
    ip(A, "link set eth0 down", "link set eth0 master m0", "link set eth0 up")
    assert one.sync()[0].trouble == ("eth0 is a port of m0: use m0" if trouble else "")
    ip(A, "link set eth0 nomaster", "link set eth0 up")
    assert one.sync()[0].trouble == ""


@pytest.mark.parametrize(
    "master, kind, expected",
    [
        ("bond0", b"bond\0", "use bond0"), ("team0", b"team\0", "use team0"), ("red", b"vrf\0", ""),
        ("ovs-system", b"", "use the bridge's internal port"),
    ],
)  # fmt: skip
def test_masters_this_kernel_may_not_have(one, master, kind, expected):
    more = {link.IFLA_MASTER: struct.pack("i", 7), link.IFLA_ADDRESS: bytes(6)}
    if kind:
        more[link.IFLA_LINKINFO] = struct.pack(f"2H{len(kind)}s0I", 4 + len(kind), link.IFLA_INFO_SLAVE_KIND, kind)
    told = one.network._link(link.IFF_UP | link.IFF_LOWER_UP, more, {7: master}, {}).trouble
    assert told.endswith(expected) and bool(told) == bool(expected)


def test_a_name_of_another_interface_that_is_no_text_stops_nobody(one):
    one.inside(lambda: run("ip", "link", "add", b"b\xfcro", "type", "bridge"))
    assert one.sync()[0].trouble == ""
    one.inside(lambda: run("ip", "link", "del", b"b\xfcro"))


def test_an_interface_without_arp_says_what_to_do_and_so_does_the_loopback(one):
    ip(A, "link set eth0 arp off")
    state = one.sync()[0]
    assert state.trouble.startswith("eth0 does not speak ARP") and "set arp on" in state.trouble and not state.arp
    ip(A, "link set eth0 arp on")
    assert one.sync()[0].trouble == ""
    ip(A, "link set lo up")
    assert "lo does not speak ARP" in one.inside(lambda: link.Network("lo").sync(listen=False)[0].trouble)


def test_ipv6_that_is_off_is_named_and_concerns_ipv6_only(one):
    set_sysctls(A, {"ipv6.conf.eth0.disable_ipv6": 1})
    state, _, own = one.sync()
    assert state.trouble6 == "IPv6 is switched off on eth0: set disable_ipv6 to 0"
    assert not state.trouble and 6 not in own
    set_sysctls(A, {"ipv6.conf.eth0.disable_ipv6": 0})
    assert not one.sync()[0].trouble6
    ip(A, "link set eth0 mtu 1000")
    assert "MTU" in one.sync()[0].trouble6


@pytest.mark.parametrize("ignore", [0, 1, 2, 3, 4, 8])
def test_an_address_of_another_interface_is_this_hosts_own_where_the_kernel_answers_for_it(lan, ignore):
    one = lan[0]
    ip(A, "link set lo up", "addr add 10.0.0.77/32 dev lo")
    set_sysctls(A, {"ipv4.conf.all.arp_ignore": ignore})
    own = ipaddress.ip_interface("10.0.0.77/32") in one.sync()[1]
    with socket_in(B, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"", ("10.0.0.77", 9))
    time.sleep(0.3)
    assert ("lladdr" in ip(B, "neigh show 10.0.0.77")) == own == (ignore not in (1, 2, 8))
    one.network.add(VIP4)  # what is bound here counts as ours, wherever else it is
    ip(A, f"addr add {VIP4} dev lo")
    assert one.sync()[1][VIP4] is True


@pytest.mark.parametrize("value, own, trouble", [(1, True, False), (2, True, False), (2, False, True), (8, True, True)])
def test_arp_ignore_is_told_where_the_kernel_does_not_answer_clients(lan, value, own, trouble):
    one = lan[0]
    ip(A, *([] if own else ["addr del 10.0.0.1/24 dev eth0", "route add 10.0.0.0/24 dev eth0"]))
    set_sysctls(A, {"ipv4.conf.all.arp_ignore": value})
    state, _, _ = one.sync()
    one.network.add(VIP4)
    with socket_in(B, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"", (str(VIP4.ip), 9))
    time.sleep(0.3)
    assert ("lladdr" not in ip(B, f"neigh show {VIP4.ip}")) == trouble == bool(state.trouble4) and state.trouble == ""


def test_down_dormant_and_carrier_are_told(one):
    ip(SWITCH, "link set port1 down")
    assert one.sync()[0].trouble == "eth0 has no carrier"
    ip(A, "link set eth0 down")
    state = one.sync()[0]
    assert (state.trouble, state.up, state.arp) == ("eth0 is down", False, False)
    ip(SWITCH, "link set port1 up")
    ip(A, "link set eth0 mode dormant", "link set eth0 up")
    state = one.sync()[0]
    assert (state.trouble, state.up) == ("eth0 is dormant (802.1X?)", False)
    ip(A, "link set eth0 mode default state up")
    assert one.sync()[0].trouble == ""


def test_a_renamed_interface_is_followed_and_still_heard(lan, caplog):
    one, other = lan
    before, *_ = one.sync()
    ip(A, "link set eth0 down", "link set eth0 name lan0", "link set lan0 up")
    assert one.network.changed() and one.sync()[0] == before._replace(mac=MAC_A) and one.network.name == "lan0"
    assert "eth0 is called lan0 now" in caplog.text
    other.sync(), one.hear()
    other.network.send([link.Frames(MAC_B, {}).ask(VIP4.ip)])
    assert ("10.0.0.100", "ASK") in about(one.hear())
    one.network.add(VIP4)
    ip(A, "link add eth0 type bridge")  # another one takes the old name: ours lives
    assert VIP4 in one.sync()[1]


@pytest.mark.parametrize("same", [False, True])
def test_an_interface_made_anew_is_found_also_with_the_same_index(lan, same):
    one, other = lan
    number = one.sync()[0].number
    ip(A, "link del eth0")
    if not same:
        state, *rest = one.sync()
        assert state.trouble.startswith("eth0 does not exist: ") and state.number == 0
        assert rest == [{}, {}] and len(one.network.files()) == 1
        one.network.send([b"x" * 60]), one.network.remove(VIP4)  # no error
    index = f"index {number} " if same else ""
    made = f"link add eth0 {index}address 02:00:00:00:aa:01 type veth peer name port1 netns {SWITCH}"
    ip(A, made, "link set eth0 up")
    ip(SWITCH, "link set port1 master br0", "link set port1 up")
    assert one.network.changed() and (one.sync()[0].number == number) is same
    other.sync(), one.hear()
    other.network.send([link.Frames(MAC_B, {}).ask(VIP4.ip)])
    assert "10.0.0.100" in [heard.address for heard in one.hear()]


def test_an_error_is_not_absence(one):
    one.network._netlink, soft = one.network._netlink, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, soft[1]))
    try:
        with pytest.raises(OSError) as caught:
            one.network.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, soft)
    assert caught.value.errno == errno.EMFILE
    assert one.sync()[0].up and len(one.network.files()) == 3


CHILD = f"""
import os, sys; sys.path.insert(0, {str(Path(link.__file__).parent)!r}); import link, ipaddress
network = link.Network("lo")
if sys.argv[1] == "nobody": os.setuid(65534)
print(network.sync(listen=False)[0].number)
for action in (network.sync, lambda: network.add(ipaddress.ip_interface("127.0.0.9/32"))):
    try: action(); print("fine")
    except OSError as error: print(error.strerror)
"""


@pytest.mark.parametrize(
    "who, before, expected",
    [
        ("root of a user namespace", ["unshare", "-Urn"], ["1", "fine", "fine"]),
        ("nobody", ["unshare", "-n"], ["1", "needs CAP_NET_RAW for packet sockets", "needs CAP_NET_ADMIN"]),
    ],
)
def test_what_is_missing_is_said_and_what_can_be_done_without_is(who, before, expected):
    command = [*before, sys.executable, "-c", CHILD, who]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.split("\n")[:3] == expected, done.stderr


def test_a_thousand_addresses_are_read_whole_while_others_come_and_go(one):
    one.sync()
    mine = {ipaddress.ip_interface(f"10.9.{n >> 8}.{n & 255}/32") for n in range(500)}
    mine |= {ipaddress.ip_interface(f"fd77:9::{n:x}/128") for n in range(500)}
    for address in mine:
        one.network.add(address)
    stop, torn = threading.Event(), 0

    def come_and_go() -> None:
        other = link.Network("eth0")
        other.sync(listen=False)
        for n in itertools.cycle(range(100)):
            if stop.is_set():
                return
            address = ipaddress.ip_interface(f"10.8.0.{n}/32")
            (
                other.add(address),
                other.remove(address),
                time.sleep(0.1 if n % 20 == 0 else 0.0005),
            )  # now and then it rests

    thread = threading.Thread(target=one.inside, args=(come_and_go,))
    thread.start()
    try:
        for _ in range(100):
            try:
                assert mine <= {ip for _, ip, _, _ in one.network._bound()}
            except OSError as error:
                assert error.errno == errno.EAGAIN
                torn += 1
    finally:
        stop.set(), thread.join()
    assert torn < 50 and mine <= set(one.sync()[1])


def test_addresses_are_asked_for_without_an_index_since_the_kernel_does_not_tell_when_such_a_dump_is_torn(one):
    ask, asked = one.network._netlink.ask, []
    one.network._netlink.ask = lambda *request: asked.append(request) or ask(*request)
    assert one.sync() and (link.RTM_GETADDR, link.NLM_F_DUMP, bytes(8)) in asked


class Torn:
    """A netlink socket whose first `bad` dumps are marked as interrupted (NLM_F_DUMP_INTR)."""

    def __init__(self, bad: int) -> None:
        self.bad, self.number = bad, 0

    def send(self, request: bytes) -> None:
        (self.number,) = struct.unpack_from("I", request, 8)

    def recv(self, size: int) -> bytes:
        self.bad -= 1
        flags = link.NLM_F_DUMP_INTR if self.bad >= 0 else 0
        late = struct.pack("I2H2I4s", 20, link.NLMSG_ERROR, 0, self.number - 1, 0, b"\xff" * 4)
        one = struct.pack("I2H2I4s", 20, link.RTM_NEWADDR, flags, self.number, 0, str(self.number).encode().ljust(4))
        return late + one + struct.pack("I2H2I4x", 20, link.NLMSG_DONE, flags, self.number, 0)


def test_a_torn_dump_is_read_again_but_not_for_ever():
    netlink = link.Netlink()
    netlink._socket = Torn(2)  # type: ignore[assignment]
    assert netlink.ask(link.RTM_GETADDR, link.NLM_F_DUMP, b"") == [b"3   "]
    netlink._socket = Torn(99)  # type: ignore[assignment]
    with pytest.raises(OSError, match="changes faster"):
        netlink.ask(link.RTM_GETADDR, link.NLM_F_DUMP, b"")


def test_only_news_of_our_own_interface_are_hints(one):
    one.sync()
    while one.network.changed():
        pass
    for n in range(30):
        ip(A, f"link add x{n} type veth peer name y{n}", f"addr add 10.5.0.{n}/24 dev x{n}", f"link del x{n}")
    assert not one.network.changed()
    one.network.add(VIP4)
    assert one.network.changed() and not one.network.changed()
    ip(A, "addr add 10.0.0.7/24 dev eth0")
    assert one.network.changed()


def test_gateways_are_the_default_routes_of_this_interface_and_are_no_virtual_ips(one, tmp_path, capsys):
    one.sync()
    assert one.network.gateways() == []
    ip(A, "route add default via 10.0.0.254", "-6 route add default via fd77::fe")
    ip(A, "route add 198.51.100.0/24 via 10.0.0.253")
    assert one.network.gateways() == ["10.0.0.254", "fd77::fe"]
    for address, code in (("10.0.0.9", 0), ("10.0.0.254", 2), ("fd77::00fe/64", 2), ("10.0.0.1", 0), ("10.0.0.255", 0)):
        (tmp_path / "link.yml").write_text(f"interface: eth0\nstate_dir: {tmp_path}\nips: [ip: '{address}']\n")
        assert one.inside(lambda: link.main(["--check", "--config", str(tmp_path / "link.yml")])) == code
        said, own = capsys.readouterr().err, address in ("10.0.0.1", "10.0.0.255")
        assert ("is this host's default gateway; remove it" in said) is (code == 2)
        assert (f"ips: {address} is this host's own, or its network's" in said) is own
    ip(A, "link add x0 type bridge", "addr add 10.7.0.1/24 dev x0", "link set x0 up")
    ip(A, "route replace default via 10.7.0.254 dev x0", "-6 route del default")
    assert one.network.gateways() == []


# ------------------------------------------------------------------------------------------------ frames on the wire


def tagged(frame: bytes, tag: int) -> bytes:
    return frame[:12] + b"\x81\0" + tag.to_bytes(2, "big") + frame[12:]


def about(heard: list[link.Heard]) -> list[tuple[str, str]]:
    return [(one.address, one.kind.name) for one in heard if one.mac == MAC_B]


@pytest.fixture
def talk(lan: tuple[Host, Host]) -> Callable[..., list[tuple[str, str]]]:
    one, other = lan
    one.sync(), other.sync()
    time.sleep(0.2)  # multicast listener reports and such

    def say(*frames: bytes) -> list[tuple[str, str]]:
        one.hear(0)
        other.network.send(frames)
        return about(one.hear())

    say.one, say.other = one, other  # type: ignore[attr-defined]
    return say


FRAMES = link.Frames(MAC_B, {6: "fe80::2"})


@pytest.mark.parametrize("vip", [VIP4, VIP6], ids=["ARP", "ND"])
def test_another_vlan_is_another_network(talk, vip):
    frames = [*FRAMES.announce(vip.ip), FRAMES.ask(vip.ip), FRAMES.ask(vip.ip, MAC_A, Kind.WANT)]
    assert talk(*[tagged(frame, 200) for frame in frames], *[tagged(frame, 0x6000 | 4094) for frame in frames]) == []
    assert {kind for _, kind in talk(*[tagged(frame, 0x6000) for frame in frames])} == {"CLAIM", "ASK", "WANT"}  # id 0


def test_frames_of_an_interface_on_top_of_ours_are_not_ours(talk):
    ip(A, "link add link eth0 name mac0 address 02:00:00:00:aa:07 type macvlan mode bridge", "link set mac0 up")
    time.sleep(0.1)
    frames = [FRAMES.ask(VIP4.ip, mac) for mac in (bytes.fromhex("02000000aa07"), MAC_A)]
    assert talk(*frames) == [("10.0.0.100", "ASK")]


@pytest.mark.parametrize("netfilter", [0, 1])
@pytest.mark.parametrize("vip", [VIP4, VIP6], ids=["ARP", "ND"])
def test_words_pass_a_switch_and_kernels_do_not_heed_them(talk, vip, netfilter):
    for name in ("arptables", "iptables", "ip6tables"):
        with contextlib.suppress(FileNotFoundError):  # br_netfilter
            set_sysctls(SWITCH, {f"bridge.bridge-nf-call-{name}": netfilter})
    talk.one.network.add(vip)
    time.sleep(0.05)
    talk.other.network.receive()
    words = [FRAMES.ask(vip.ip, to, kind) for kind in (Kind.WANT, Kind.GIVE) for to in (MAC_A, b"\xff" * 6)]
    assert talk(*words) == [(str(vip.ip), kind) for kind in ("WANT", "WANT", "GIVE", "GIVE")]
    answers = [heard for heard in talk.other.hear() if heard.mac == MAC_A]
    if vip.version == 4:
        assert answers == []
    else:  # a solicitation like any other, its option unknown
        assert {heard.kind for heard in answers} <= {Kind.CLAIM, Kind.ASK}
    assert vip in talk.one.sync()[1]
    assert str(vip.ip) not in ip(A, "neigh")


@pytest.mark.parametrize("others", [0, 1, 31, 32, 33, 300, 1000, 1500])
def test_the_kernel_lets_through_what_is_about_our_addresses(talk, others):
    base = {4: int(ipaddress.ip_address("192.168.0.0")), 6: int(ipaddress.ip_address("fd77:1::"))}
    names = [str(ipaddress.ip_address(base[v] + 7 * n)) for v in base for n in range(others)]
    edges = [names[0], names[others - 1], names[others], names[-1]] if others else []
    talk.one.network.hear_only([*names, "10.0.0.100", "fd77::100"])
    wanted = ["10.0.0.100", *edges[:2], "fd77::100", *edges[2:]]
    asked = [FRAMES.ask(ipaddress.ip_address(a)) for a in wanted]
    foreign = ["203.0.113.9", "10.1.0.99", "fd77::ff:99", "fe80::1:99"]
    told = [f for a in foreign for f in FRAMES.announce(ipaddress.ip_address(a))]
    assert talk(*told, *asked, *told) == [(a, "ASK") for a in wanted]
    near = talk(*FRAMES.announce(ipaddress.ip_address("10.0.0.99")), FRAMES.ask(ipaddress.ip_address("fd77::99")))
    assert near == []


def test_the_filter_follows_and_survives_a_new_interface(talk):
    asked = [FRAMES.ask(ipaddress.ip_address(a)) for a in ("10.0.0.100", "10.0.0.101", "fd77::100", "fd77::101")]
    assert len(talk(*asked)) == 4
    talk.one.network.hear_only(["10.0.0.100", "fd77::101"])
    expected = [("10.0.0.100", "ASK"), ("fd77::101", "ASK")]
    assert talk(*asked) == expected
    talk.one.inside(lambda: talk.one.network._open(talk.one.network._index))
    assert talk(*asked) == expected
    talk.one.network.hear_only([])
    assert talk(*asked) == []


def test_a_client_that_asks_for_the_vip_is_not_told_but_the_holder_that_asks_is(talk):
    talk.one.network.hear_only(["10.0.0.100"])
    request = FRAMES.announce(VIP4.ip)[0]
    client = request[:28] + socket.inet_aton("10.0.0.55") + request[32:]
    holder = request[:38] + socket.inet_aton("10.0.0.55")
    assert talk(client, holder, holder.replace(MAC_B, MAC_A, 1)) == [("10.0.0.100", "CLAIM")]


def test_no_more_than_the_limit_is_read_at_once(talk):
    talk.other.network.send([FRAMES.ask(VIP4.ip)] * 50)
    time.sleep(0.1)
    read = [talk.one.network.receive(limit=20) for _ in range(4)]
    assert [(len(about(heard)), more) for heard, more in read] == [(20, True), (20, True), (10, False), (0, False)]


def test_another_interface_of_this_machine_is_no_rival(lan):
    one, other = lan
    ip(A, f"link add eth1 address 02:00:00:00:aa:02 type veth peer name port3 netns {SWITCH}", "link set eth1 up")
    one.sync(), other.sync(), time.sleep(0.1), one.hear(), one.network.changed()
    other.network.send([FRAMES.ask(VIP4.ip)])  # has the MAC of our eth1
    assert about(one.hear()) == []
    ip(A, "link del eth1")
    assert not one.network.changed()
    one.sync()
    other.network.send([FRAMES.ask(VIP4.ip)])
    assert len(about(one.hear())) == 1


def test_what_is_lost_on_the_way_out_holds_up_nothing_and_a_lost_frame_is_no_trouble(lan, caplog):
    one, other = lan
    one.sync(), other.sync()
    one.network.send([bytes(5000), link.Frames(MAC_A, {}).ask(VIP4.ip)]), one.network.send([bytes(5000)])
    assert "10.0.0.100" in [heard.address for heard in other.hear()]  # it came behind what could not be sent
    ip(A, "link set eth0 down")
    one.network.send([FRAMES.ask(VIP4.ip)])
    assert not one.network.send_error and not caplog.records


@pytest.mark.parametrize("also", [False, True])
def test_that_no_frame_of_a_protocol_gets_out_is_trouble_while_it_lasts_and_told_once(one, monkeypatch, caplog, also):
    """Also where those of the other protocol do, through a filter that heeds one of them."""

    def fail(seconds: float, frame: bytes = FRAMES.ask(VIP4.ip)) -> str:
        clock.monotonic = lambda: 1000 + seconds
        one.network.send([frame])
        one.network.send([FRAMES.ask(VIP6.ip)] * also)
        return one.network.send_error

    one.sync()
    if subprocess.run(f"tc -n {A} qdisc replace dev eth0 root pfifo limit 0".split(), check=False).returncode:
        pytest.skip("no tc, or no pfifo")
    if also:
        monkeypatch.setitem(one.network._packets, link.ETH_P_IPV6, mock.Mock())
    monkeypatch.setattr(link, "time", clock := SimpleNamespace(monotonic=None))
    assert [fail(0), fail(0.1), fail(4.9)] == ["", "", ""] and not caplog.records, "a queue may be full for a moment"
    why = "cannot send on eth0 (No buffer space available): see `tc qdisc`, and the egress filters of nft"
    assert [fail(9), fail(19)] == [why, why] and [record.message for record in caplog.records] == [why]
    clock.monotonic = lambda: 1040
    assert not one.network.send_error, "nothing is sent any more"
    assert [fail(41), fail(44)] == ["", ""], "who is asked once a minute is not all that is sent"
    assert fail(46.5) == why
    ip(A, "link set eth0 up"), run("tc", "-n", A, "qdisc", "del", "dev", "eth0", "root")
    assert not fail(47) and not one.network.unsent


@pytest.mark.parametrize("room, foreign", [(20480, 0), (2048, 4)])
def test_where_there_is_no_room_for_the_filter_all_is_heard(talk, room, foreign):
    with contextlib.suppress(FileNotFoundError):  # 20480 was the default before Linux 6.7
        set_sysctls(A, {"core.optmem_max": room})
    names = [str(ipaddress.ip_address("192.168.0.0") + 3 * n) for n in range(999)]
    for wanted in (["10.0.0.77"], [*names, "10.0.0.100"], [*names, "10.0.0.101"]):
        talk.one.network.hear_only(wanted)
    asked = [FRAMES.ask(ipaddress.ip_address(a)) for a in ("10.0.0.101", names[500])]
    told = [f for a in ("203.0.113.9", "10.1.0.99") for f in FRAMES.announce(ipaddress.ip_address(a))]
    assert len(talk(*told, *asked)) == 2 + foreign


def test_a_tagged_interface_hears_its_own_vlan(lan):
    for namespace in (A, B):
        if not can(namespace, "link add link eth0 name eth0.200 type vlan id 200"):
            pytest.skip("this kernel has no VLAN interfaces")
        ip(namespace, "link set eth0.200 up")
    one, other = (host.inside(lambda: link.Network("eth0.200")) for host in lan)
    lan[0].inside(one.sync), lan[1].inside(other.sync)
    other.send([FRAMES.ask(VIP4.ip)])
    time.sleep(0.1)
    assert ("10.0.0.100", "ASK") in about(one.receive()[0])


def test_the_api_can_listen_on_a_link_local_address_of_an_interface(lan):
    ip(A, "addr add fe80::1/64 dev eth0 nodad")
    given = {"interface": "eth0", "listen": "[fe80::1%eth0]:0", "user": "link", "password": "link"}
    agent = mock.MagicMock(config=link.make_config(given, {}, {}))
    with in_namespace(A, lambda: link.Server(agent)) as server:
        assert server.server_address[3] == in_namespace(A, lambda: socket.if_nametoindex("eth0"))
