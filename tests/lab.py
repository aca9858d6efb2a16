"""Several hosts on one machine: namespaces, a real ZooKeeper, an observer, ears.

A host is a network namespace, its cable a veth pair, the LAN a bridge in a namespace of its own. Kernel, ARP,
addresses and timing are real; only the machines are not. Needs root and iproute2; ZooKeeper comes from Debian's
package. The order of the file: tools, ZooKeeper, the hosts, the lab, ears, the observer, the command line.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import gc
import heapq
import http.client
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve()
PROGRAM = HERE.parents[1] / "link.py"
NAMESPACES = Path("/run/netns")
CLIENT, ZOOKEEPER = 200, 250  # the last byte of their addresses; a host's is its number
PROBE_PORT = 7777
NOWHERE = "02:4c:00:00:ff:ff"  # a hardware address that nobody has
T = TypeVar("T")
Span = tuple[float, float]
_serial = itertools.count(1)

# ---------------------------------------------------------------------------------------------------------- tools


def run(*command: str) -> str:
    """Run a command and return its output; RuntimeError with its complaint if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def version(commit: str) -> str:
    """The program as it was then; AssertionError if that is not in git's history."""
    try:
        return run("git", "-c", "safe.directory=*", "-C", str(PROGRAM.parent), "show", f"{commit}:link.py")
    except RuntimeError as error:
        raise AssertionError(f"no history of git to get {commit} from (git fetch --unshallow?): {error}") from error


def ip(namespace: str, *lines: str) -> str:
    """Run `ip` in a namespace, for each of these lines."""
    return "".join(run("ip", "-n", namespace, *line.split()) for line in lines)


def wait_until(condition: Callable[[], T], timeout: float = 5.0, what: str = "") -> T:
    """Ask `condition` every 10 ms until it is true and return its answer; AssertionError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition} (last answer: {answer!r})")
        time.sleep(0.01)
    return answer


def in_namespace(namespace: str | None, action: Callable[[], T]) -> T:
    """Call `action` inside a network namespace, on a thread of its own, so that the caller never leaves his own."""

    def work() -> T:
        if namespace is not None:
            libc = ctypes.CDLL(None, use_errno=True)
            with (NAMESPACES / namespace).open() as handle:
                if libc.setns(handle.fileno(), 0x40000000):  # CLONE_NEWNET, for this thread alone
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
        return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def socket_in(namespace: str | None, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a socket inside a namespace; it stays there, wherever it is used. None is the caller's own."""
    return in_namespace(namespace, lambda: socket.socket(family, kind, protocol))


def connect(namespace: str, address: str, port: int, timeout: float = 1.0) -> socket.socket:
    """A TCP connection from inside a namespace."""
    return in_namespace(namespace, lambda: socket.create_connection((address, port), timeout))


def set_sysctls(namespace: str, settings: dict[str, int]) -> None:
    """Write /proc/sys/net settings of one namespace, given without the leading "net."."""

    def write() -> None:
        for key, value in settings.items():
            Path("/proc/sys/net", *key.split(".")).write_text(str(value))

    in_namespace(namespace, write)


def merge(spans: Iterable[Span], slack: float = 0.0) -> list[Span]:
    """Join spans that overlap, or are no more than `slack` apart; sorted."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + slack:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def reap(process: subprocess.Popen[bytes] | None) -> None:
    """Kill a process and all it started, and wait for its end."""
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


# ------------------------------------------------------------------------------------------------------ ZooKeeper


def four_letters(namespace: str, address: str, port: int, word: str) -> str:
    """What a ZooKeeper server answers to one of its four-letter words, "" if nothing."""
    with contextlib.suppress(OSError), connect(namespace, address, port) as sock:
        sock.sendall(word.encode())
        return sock.makefile().read()
    return ""


def zookeeper_mode(namespace: str, address: str, port: int = 2181) -> str:
    """What a server says it is: "standalone", "leader", "follower", or "" while it does not serve."""
    found = re.search(r"^Mode: (\w+)", four_letters(namespace, address, port, "srvr"), re.M)
    return found[1] if found else ""


class ZooKeeper:
    """Real ZooKeeper servers, of Debian's package, in the lab's namespace for them; `count=3` makes an ensemble."""

    TICK = 500  # ms
    JAVA = (
        "java -Xmx96m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Xshare:auto"
        " -Dzookeeper.preAllocSize=64 -cp /usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar"
        " org.apache.zookeeper.server.quorum.QuorumPeerMain"
    )

    def __init__(self, lab: Lab, count: int) -> None:
        self._lab, self._address = lab, lab.address(ZOOKEEPER)
        self._ports = [2000 + 100 * count + 10 * number for number in range(count)]
        self._directories = [lab.directory / f"zk{port}" for port in self._ports]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self.hosts = ",".join(f"{self._address}:{port}" for port in self._ports)  # the connect string
        for number, directory in enumerate(self._directories):
            settings = {
                "tickTime": self.TICK, "initLimit": 20, "syncLimit": 4, "minSessionTimeout": 2 * self.TICK,
                "maxSessionTimeout": 60000, "maxClientCnxns": 0, "dataDir": directory / "data",
                "clientPortAddress": self._address, "clientPort": self._ports[number], "admin.enableServer": "false",
                "4lw.commands.whitelist": "*",
            }  # fmt: skip
            for n, port in enumerate(self._ports if count > 1 else [], 1):
                settings[f"server.{n}"] = f"{self._address}:{port + 1}:{port + 2}"
            (directory / "data").mkdir(parents=True)
            (directory / "data" / "myid").write_text(str(number + 1))
            (directory / "cfg").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        self.start()

    def start(self) -> None:
        """Start those that are dead, let those that hang go on, and wait until all serve."""
        for number, directory in enumerate(self._directories):
            process = self._processes[number]
            if process and process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
            else:
                command = ["ip", "netns", "exec", self._lab.zk, *self.JAVA.split(), f"{directory}/cfg"]
                self._processes[number] = self._lab.spawn(command, directory / "log")
        wait_until(lambda: all(map(self.mode, range(len(self._ports)))), 30, f"ZooKeeper ready: {self._directories}")

    def stop(self, *numbers: int) -> None:
        """Kill these servers, or all."""
        for number in numbers or range(len(self._ports)):
            reap(self._processes[number])

    def pause(self, *numbers: int) -> None:
        """Hang these servers, or all: connections stay open, nothing is answered."""
        for number in numbers or range(len(self._ports)):
            if process := self._processes[number]:
                os.kill(process.pid, signal.SIGSTOP)

    def wipe(self) -> None:
        """Stop every server and delete all data."""
        self.stop()
        for directory in self._directories:
            shutil.rmtree(directory / "data" / "version-2", ignore_errors=True)

    def ask(self, word: str, number: int) -> str:
        return four_letters(self._lab.zk, self._address, self._ports[number], word)

    def mode(self, number: int) -> str:
        return zookeeper_mode(self._lab.zk, self._address, self._ports[number])


# ---------------------------------------------------------------------------------------------------------- hosts


class Host:
    """One host of a lab: a namespace with a cable to the switch, an agent, and the responder that probes talk to.

    `presence` records when it left and rejoined the LAN (unplugged, isolated, off): (monotonic time, is it there).
    """

    def __init__(self, lab: Lab, number: int) -> None:
        self.lab, self.number, self.name = lab, number, f"node{number}"
        self.namespace, self.interface, self.port = f"{lab.prefix}{number}", f"eth{9 + number}", f"p{number}"
        self.address, self.address6, self.mac = lab.address(number), lab.address6(number), lab.mac(number)
        self.directory = lab.directory / self.name
        self.config_path, self.log_path = self.directory / "link.yml", self.directory / "log"
        self.config: dict[str, Any] = {}
        self.environment: dict[str, str] = {}  # its agent's, beside our own
        self.agent: subprocess.Popen[bytes] | None = None
        self.presence: list[tuple[float, bool]] = []
        self._responder: subprocess.Popen[bytes] | None = None
        self._relay: subprocess.Popen[bytes] | None = None
        self._faulty = self._cut = False
        (self.directory / "state").mkdir(parents=True)

    # the agent

    def base(self) -> dict[str, Any]:
        """The part of its agent's configuration that is its own."""
        state = str(self.directory / "state")
        return {"hostname": self.name, "interface": self.interface, "state_dir": state, "listen": "127.0.0.1:1313"}

    def start(self, program: Path, **config: Any) -> None:
        """Write the configuration and start the agent; its pid is `agent.pid`."""
        self.config = {**self.base(), **config}
        self.config_path.write_text(json.dumps(self.config, indent=1))  # JSON is YAML
        # A power cycle must change the boot id; `ip netns exec` gives the mount a namespace of its own.
        script = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "sh", "-c", script, "sh", str(self.directory / "boot_id")]
        command = [*inside, sys.executable, str(program), "--config", str(self.config_path)]
        self.agent = self.lab.spawn(command, self.log_path, env={**os.environ, **self.environment})

    @property
    def alive(self) -> bool:
        """Whether its agent runs."""
        return self.agent is not None and self.agent.poll() is None

    @property
    def on(self) -> bool:
        """Whether the host itself does."""
        return self._responder is not None and self._responder.poll() is None

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 15.0) -> tuple[int, float]:
        """Ask the agent to end and wait; its exit code and how long it took."""
        began = time.monotonic()
        self.kill(sig)
        assert self.agent
        return self.agent.wait(timeout), time.monotonic() - began

    def kill(self, sig: int) -> None:
        """Send the agent a signal and do not wait; SIGKILL takes along what it has started."""
        assert self.agent is not None, f"{self.name} has no agent"
        (os.killpg if sig == signal.SIGKILL else os.kill)(self.agent.pid, sig)

    def api(self, method: str, path: str, body: Any = None, timeout: float = 5.0) -> tuple[int, Any]:
        """Ask the agent's API: status and parsed answer (None if it is empty)."""
        host, _, port = self.config["listen"].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port))
        with contextlib.closing(connection):
            connection.sock = connect(self.namespace, host, int(port), timeout)
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text.strip() else None

    def log(self) -> str:
        """All that the agent has written so far; it is kept from one start to the next."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # its addresses

    def ip(self, *lines: str) -> str:
        """Run `ip` in this host, for each of these lines."""
        return ip(self.namespace, *lines)

    def addresses(self) -> set[str]:
        """Every address of the LAN interface, with its prefix length."""
        return {line.split()[3] for line in self.ip(f"-o addr show dev {self.interface}").splitlines()}

    def bound(self) -> set[str]:
        """The same without their prefix lengths."""
        return {address.partition("/")[0] for address in self.addresses()}

    def strange(self) -> list[str]:
        """Those that are not its own."""
        own = {f"{self.address}/24", f"{self.address6}/64"}
        return [address for address in self.addresses() - own if not address.startswith("fe80:")]

    def add_address(self, address: str) -> None:
        self.ip(f"addr add {address} dev {self.interface} {'nodad' if ':' in address else ''}")

    def del_address(self, *addresses: str) -> None:
        self.ip(*(f"addr del {address} dev {self.interface}" for address in addresses))

    # faults; `mend` ends them all. Off the LAN counts from when it is complete, and no longer once its end begins

    def unplug(self) -> None:
        """Pull the cable: no carrier."""
        ip(self.lab.switch, f"link set {self.port} down")
        self._faulty = True
        self.presence.append((time.monotonic(), False))

    def isolate(self) -> None:
        """Let no frame pass in either direction; the carrier stays."""
        self._bridge("state 0")
        self.presence.append((time.monotonic(), False))

    def deafen(self) -> None:
        """It hears nothing and can still send; the carrier stays."""
        self._bridge("learning off flood off mcast_flood off bcast_flood off")
        ip(self.lab.switch, f"link set dev {self.port} type bridge_slave fdb_flush")

    def mute(self) -> None:
        """It hears everything and nothing that it sends arrives; the carrier stays."""
        self._bridge("learning off locked on")
        ip(self.lab.switch, f"link set dev {self.port} type bridge_slave fdb_flush")

    def cut_zookeeper(self) -> None:
        """Lose every packet to and from ZooKeeper, silently; connections stay open, the LAN works.

        Both kernels are given a hardware address for each other that nobody has.
        """
        self._cut = True
        nowhere = f"lladdr {NOWHERE} nud permanent dev"
        self.ip(f"neigh replace {self.lab.address(ZOOKEEPER)} {nowhere} {self.interface}")
        ip(self.lab.zk, f"neigh replace {self.address} {nowhere} eth0")

    def worsen(self, loss: float, delay: float, jitter: float) -> None:
        """A bad cable: each frame in either direction is lost with this probability, or late by delay ± jitter s.

        Not every kernel has netem, so a process hands the frames over between the cable and the switch.
        """
        ends = [f"link set {self.port}{end} up" for end in "ab"]
        ip(self.lab.switch, f"link add {self.port}a type veth peer name {self.port}b", *ends)
        ip(self.lab.switch, f"link set {self.port}b master br0")
        wait_until(lambda: self._forwards(f"{self.port}b"), 5, f"the other port of {self.name} forwards")
        numbers = map(str, (loss, delay, jitter))
        inside = ["ip", "netns", "exec", self.lab.switch, sys.executable, "-IS", str(HERE), "relay"]
        command = [*inside, self.port, f"{self.port}a", *numbers]
        self._relay = self.lab.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._relay.stdin and self._relay.stdout
        assert self._relay.stdout.readline(), f"the bad cable of {self.name} does not work"
        ip(self.lab.switch, f"link set {self.port} nomaster")
        self._relay.stdin.close()  # it may begin

    def power_off(self) -> None:
        """The host dies: all at once, with no last word."""
        self.isolate()
        reap(self.agent)
        reap(self._responder)

    def power_on(self) -> None:
        """As after a boot: with its own addresses only, a new boot id and no agent yet. The responder runs."""
        self.del_address(*self.strange())
        (self.directory / "boot_id").write_text(f"{uuid.uuid4()}\n")
        self.start_responder()

    def start_responder(self) -> None:
        """Start what answers the observer's probes, and wait for it."""
        inside = ["ip", "netns", "exec", self.namespace, sys.executable, "-IS", str(HERE), "respond", self.name]
        self._responder = self.lab.spawn(inside, stdout=subprocess.PIPE)
        assert self._responder.stdout is not None
        assert self._responder.stdout.readline(), f"the responder of {self.name} did not start"

    def mend(self) -> None:
        """End every fault; a host that is off is switched on, with no agent yet."""
        if self.alive:
            self.kill(signal.SIGCONT)
        if not self.on:
            self.power_on()
        if self._faulty:
            self.presence.append((time.monotonic(), True))
            ip(self.lab.switch, f"link set {self.port} up")
            self._bridge("learning on flood on mcast_flood on bcast_flood on locked off")
            wait_until(lambda: self._forwards(self.port), 5, f"{self.port} forwards")
            self._faulty = False
        if self._relay:
            reap(self._relay)
            self._relay = None
            ip(self.lab.switch, f"link del {self.port}a", f"link set {self.port} master br0")
        if self._cut:
            self.ip(f"neigh del {self.lab.address(ZOOKEEPER)} dev {self.interface}")
            ip(self.lab.zk, f"neigh del {self.address} dev eth0")
            self._cut = False

    def _forwards(self, port: str) -> bool:
        """Let a port forward frames; False while the kernel has yet to notice that its cable is there."""
        with contextlib.suppress(RuntimeError):
            run("bridge", "-n", self.lab.switch, "link", "set", "dev", port, "state", "3")
            return True
        return False

    def _bridge(self, settings: str) -> None:
        self._faulty = True
        run("bridge", "-n", self.lab.switch, "link", "set", "dev", self.port, *settings.split())


# ------------------------------------------------------------------------------------------------------------ lab


class Lab:
    """Hosts, a client and room for ZooKeeper on one LAN. A context manager: at its end everything is gone.

    `hosts[0]` is host 1: node1, namespace <prefix>1, interface eth10, 10.77.0.1/24, 02:4c:00:00:00:01.
    """

    def __init__(self, hosts: int = 3) -> None:
        self.prefix, self.count = f"lk{os.getpid()}x{next(_serial)}-", hosts
        self.switch, self.client, self.zk = (self.prefix + role for role in ("sw", "cl", "zk"))
        self.hosts: list[Host] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        for namespace in NAMESPACES.glob("lk*x*-*"):  # of labs that were killed
            if not Path("/proc", namespace.name[2:].partition("x")[0]).exists():
                self._remove(namespace.name.partition("-")[0] + "-")
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self.directory = Path(tempfile.mkdtemp(prefix=self.prefix))
            run("ip", "netns", "add", self.switch)
            set_sysctls(self.switch, {"ipv6.conf.default.disable_ipv6": 1, "ipv6.conf.all.disable_ipv6": 1})
            bridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0 ageing_time 30000"
            ip(self.switch, f"link add br0 {bridge}", "link set br0 up")
            self.hosts = [Host(self, number) for number in range(1, self.count + 1)]
            self._attach(self.client, "eth0", "pcl", CLIENT)
            self._attach(self.zk, "eth0", "pzk", ZOOKEEPER)
            for host in self.hosts:
                self._attach(host.namespace, host.interface, host.port, host.number)
                host.power_on()
            self.at_end = stack.pop_all()  # what is put there happens before anything is removed
        return self

    def __exit__(self, *_: object) -> None:
        self.at_end.close()

    def _close(self) -> None:
        for process in self._processes:
            reap(process)
        self._remove(self.prefix)

    @staticmethod
    def _remove(prefix: str) -> None:
        """Kill who is left in the namespaces of a lab, remove them and the directory."""
        for namespace in NAMESPACES.glob(f"{prefix}*"):
            for pid in run("ip", "netns", "pids", namespace.name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", namespace.name)
        for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            shutil.rmtree(directory, ignore_errors=True)

    def spawn(self, command: Sequence[str], log: Path | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, until the end of the lab; with `log`, its output goes there."""
        with log.open("ab") if log else contextlib.nullcontext() as out:
            options.update({"stdout": out, "stderr": subprocess.STDOUT} if log else {})
            process = subprocess.Popen(command, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def address(self, number: int) -> str:
        return f"10.77.0.{number}"

    def address6(self, number: int) -> str:
        return f"fd77::{number}"

    def mac(self, number: int) -> str:
        return f"02:4c:00:00:00:{number:02x}"

    def _attach(self, namespace: str, interface: str, port: str, number: int) -> None:
        """Make a namespace with a cable to the switch."""
        run("ip", "netns", "add", namespace)
        settings = {"ipv4.ip_forward": 0}
        for scope in "all", "default":
            settings[f"ipv4.conf.{scope}.arp_ignore"] = 1
            for name in "disable_ipv6", "accept_dad", "dad_transmits", "router_solicitations":
                settings[f"ipv6.conf.{scope}.{name}"] = 0
        set_sysctls(namespace, settings)
        self.cable(namespace, interface, port, number)
        ip(namespace, "link set lo up")

    def cable(self, namespace: str, interface: str, port: str, number: int) -> None:
        """Put a network card into a namespace and plug it into the switch."""
        card = f"link add {port} type veth peer name {interface} netns {namespace} address {self.mac(number)}"
        ip(self.switch, card, f"link set {port} master br0 up")
        own = f"addr add {self.address(number)}/24 dev {interface}", f"addr add {self.address6(number)}/64 nodad dev"
        ip(namespace, f"link set {interface} up", own[0], f"{own[1]} {interface}")


# ----------------------------------------------------------------------------------------------------------- ears


class Ear:
    """Hears each frame that reaches an interface (of a port of the switch: that its host sends); a context manager."""

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
                    self.heard(frame)

    def heard(self, frame: bytes) -> None:
        self.frames.append((time.monotonic(), frame))

    def announcements(self, vip: str) -> list[tuple[float, str, str]]:
        """(time, "request" or "reply" or "na", hardware address) of each announcement of an address."""
        return [(t, *found) for t, frame in self.frames if (found := _announcement(frame, vip))]

    def probes(self, *vips: str) -> list[str]:
        """Who asked, for each ARP probe for one of these addresses."""
        wanted = {socket.inet_aton(vip) for vip in vips}
        head = b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
        asked = [f for _, f in self.frames if f[12:22] == head and f[28:32] == bytes(4) and f[38:42] in wanted]
        return [frame[6:12].hex(":") for frame in asked]


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
    """What a TCP check looks at: a socket that listens inside a host, on port 8080; `stop` and `start` it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.start()

    def start(self) -> None:
        self._sock = socket_in(self._host.namespace, socket.AF_INET, socket.SOCK_STREAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sock.bind(("127.0.0.1", 8080))
        self._sock.listen(1024)

    def stop(self) -> None:
        self._sock.close()


# ------------------------------------------------------------------------------------------------------- observer


class Result:
    """What an observer saw of one virtual IP, or of several at once. All times are CLOCK_MONOTONIC."""

    def __init__(self, raw: dict[str, Any], presence: dict[str, list[tuple[float, bool]]], vips: list[str]) -> None:
        """`raw` is the observer's report; `presence` says which host was on the LAN when."""
        self.vips, self.began, self.ended = vips, raw["began"], raw["ended"]
        self._raw, self._presence = raw, presence
        probes = [raw["probes"][vip] for vip in vips]
        self.sent, self.lost = (sum(seen[what] for seen in probes) for what in ("sent", "lost"))  # probes
        # When (start, end) at least one of the IPs was away for the client; see `Probes` for what that means
        self.outages = merge((a, b) for seen in probes for a, b in seen["outages"])
        self.away = max((end - start for start, end in self.outages), default=0.0)
        # Who answered for the first IP, in order: (host, first answer, last answer in a row)
        self.holders: list[tuple[str, float, float]] = [tuple(turn) for turn in probes[0]["holders"]]

    def of(self, vip: str) -> Result:
        """The same for one virtual IP only."""
        return Result(self._raw, self._presence, [vip])

    def bound(self, on_lan: bool = False) -> dict[str, list[Span]]:
        """When each host had the (first) IP bound; with `on_lan`, only while that host was on the LAN."""
        found = {}
        for host, spans in self._raw["bound"][self.vips[0]].items():
            changes = [(0.0, True), *(self._presence[host] if on_lan else []), (self.ended, False)]
            there = [(start, end) for (start, is_there), (end, _) in itertools.pairwise(changes) if is_there]
            common = ((max(a, start), min(b, end)) for a, b in spans for start, end in there)
            found[host] = merge((a, b) for a, b in common if a < b)
        return found

    def holding(self, least: int, most: int, on_lan: bool = True, since: float = 0) -> list[Span]:
        """When, since then, at least `least` and at most `most` hosts had one of the IPs bound at once."""
        found: list[Span] = []
        for vip in self.vips:
            edges = [(self.began, 0), (self.ended, 0)]
            for spans in self.of(vip).bound(on_lan).values():
                edges += [edge for start, end in spans for edge in ((start, 1), (end, -1))]
            count, here = 0, []
            for (start, step), (end, _) in itertools.pairwise(sorted(edges)):
                count += step
                if least <= count <= most and end > start:
                    here.append((start, end))
            found += [(max(a, since), b) for a, b in merge(here) if b > since]
        return found

    def longest(self, least: int, most: int, on_lan: bool = True, since: float = 0) -> float:
        """The longest of them, in s."""
        return max((end - start for start, end in self.holding(least, most, on_lan, since)), default=0.0)


class Observer:
    """Watches virtual IPs from the client and from every host's kernel, in a process of its own; a context manager.

    Inside `with Observer(lab, ["10.77.0.100"]) as observer:` things happen; after it, `observer.result` tells. Each
    of the IPs is probed every `interval` s; with many IPs take a longer one (the limit is about 5000 probes a second).
    An answer after more than 50 ms means "away".
    """

    def __init__(self, lab: Lab, vips: Sequence[str], interval: float = 0.005) -> None:
        """Start watching; returns when the observer is ready."""
        self.lab, self.vips = lab, list(vips)
        hosts = {host.name: host.namespace for host in lab.hosts}
        spec = {"client": lab.client, "hosts": hosts, "vips": self.vips, "interval": interval, "late": 0.05}
        command = [sys.executable, "-IS", str(HERE), "observe"]
        self._process = lab.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "the observer did not start"

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        report = self._process.communicate(timeout=60)[0]
        presence = {host.name: list(host.presence) for host in self.lab.hosts}
        self.result = Result(json.loads(report), presence, self.vips)


class Probes:
    """The observer's view from the client: a UDP probe to each IP every `interval` s, and who answers it.

    What "away" means: a client that asked at s and was answered at a has waited from s to a. If that is longer than
    `late`, the IP was away for him from s to a, but no longer than until he asked again and was answered promptly (the
    kernel of a host without a cable keeps an answer, and sends it later); if the answer never came, from s until the
    next probe. An outage is such spans joined. So it runs from the first request that had to wait until requests are
    answered promptly again, and it includes what the client's own kernel spends on finding the new hardware address.
    """

    def __init__(self, namespace: str | None, vips: list[str], interval: float, late: float) -> None:
        self.vips, self.interval, self.late, self._next = vips, interval, late, 0
        self.sockets = {f: socket_in(namespace, f, socket.SOCK_DGRAM) for f in (socket.AF_INET, socket.AF_INET6)}
        for sock in self.sockets.values():
            sock.setblocking(False)
            for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: probes wait in the ARP queue
                sock.setsockopt(socket.SOL_SOCKET, option, 1 << 24)
        self._pending: dict[int, float] = {}
        self._sent: list[list[float]] = [[] for _ in vips]
        self._prompt: list[list[float]] = [[] for _ in vips]  # when those were sent that were answered promptly
        self._seen: list[dict[str, Any]] = [{"outages": [], "holders": [], "lost": 0} for _ in vips]
        self.began = time.monotonic()

    @property
    def due(self) -> float:
        """When the next probe is to be sent; those of several IPs are spread over the interval."""
        return self.began + self._next * self.interval / len(self.vips)

    def send_due(self) -> None:
        """Send what is due. What is overdue by more than an interval (we slept) is left out, not made up for."""
        now = time.monotonic()
        self._next = max(self._next, int((now - self.began - self.interval) * len(self.vips) / self.interval))
        while self.due <= now:
            number, self._next = self._next, self._next + 1
            which = number % len(self.vips)
            self._pending[number] = time.monotonic()
            self._sent[which].append(self._pending[number])
            with contextlib.suppress(OSError):
                vip = self.vips[which]
                self.sockets[_family(vip)].sendto(struct.pack("!Q", number), (vip, PROBE_PORT))

    def receive(self, sock: socket.socket) -> None:
        """Note the answers that have come."""
        with contextlib.suppress(OSError):
            while True:
                answer = sock.recv(256)
                now, number = time.monotonic(), struct.unpack_from("!Q", answer)[0]
                if (sent := self._pending.pop(number, None)) is None:
                    continue
                seen, host = self._seen[number % len(self.vips)], answer[8:].decode()
                if not seen["holders"] or seen["holders"][-1][0] != host:
                    seen["holders"].append([host, now, now])
                seen["holders"][-1][2] = now
                prompt = self._prompt[number % len(self.vips)]
                if now - sent > self.late:
                    again = bisect.bisect(prompt, sent)
                    seen["outages"].append((sent, min([now, *prompt[again : again + 1]])))
                else:
                    bisect.insort(prompt, sent)

    def report(self, ended: float) -> dict[str, Any]:
        """What was seen of each IP; a probe without an answer counts as lost."""
        for number, sent in self._pending.items():
            seen, times = self._seen[number % len(self.vips)], [*self._sent[number % len(self.vips)], ended]
            seen["lost"] += 1
            seen["outages"].append((sent, times[bisect.bisect(times, sent, hi=len(times) - 1)]))
        for seen, times in zip(self._seen, self._sent, strict=True):
            seen |= {"sent": len(times), "outages": merge(seen["outages"], self.interval / 2)}
        return dict(zip(self.vips, self._seen, strict=True))


class Addresses:
    """The observer's view from the hosts: netlink's address events of each, beginning with what is there."""

    def __init__(self, namespaces: dict[str, str], vips: list[str]) -> None:
        """Subscribe in each namespace, then ask for a dump."""
        self._vips = {socket.inet_pton(_family(vip), vip): vip for vip in vips}
        self._bound: dict[str, dict[str, list[list[float]]]] = {vip: {host: [] for host in namespaces} for vip in vips}
        self.sockets = {}
        for host, namespace in namespaces.items():
            sock = socket_in(namespace, socket.AF_NETLINK, socket.SOCK_RAW)
            sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE: a thousand IPs at once
            sock.bind((0, 0x10 | 0x100))  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
            sock.setblocking(False)
            sock.send(struct.pack("=IHHIIB7x", 24, 22, 0x301, 1, 0, 0))  # RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP
            self.sockets[sock] = host
            self.receive(sock)

    def receive(self, sock: socket.socket) -> None:
        """Read what one host's kernel has to say."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, now = sock.recv(1 << 17), time.monotonic()
                for kind, body in _parts(data, "=IH", 16):
                    values = dict(_parts(body[8:], "=HH", 4)) if kind in (20, 21) else {}  # RTM_NEWADDR, RTM_DELADDR
                    if vip := self._vips.get(values.get(2, values.get(1, b""))):  # IFA_LOCAL, or IFA_ADDRESS
                        spans, there = self._bound[vip][self.sockets[sock]], kind == 20 and not body[2] & 0x48
                        if there and not (spans and spans[-1][1] == float("inf")):  # not IFA_F_TENTATIVE, _DADFAILED
                            spans.append([now, float("inf")])
                        elif spans and not there:
                            spans[-1][1] = min(spans[-1][1], now)

    def report(self, now: float) -> dict[str, dict[str, list[list[float]]]]:
        """Since when and until when each host had each IP; what is still bound ends now."""
        return {
            vip: {host: [[start, min(end, now)] for start, end in spans] for host, spans in hosts.items()}
            for vip, hosts in self._bound.items()
        }


def _parts(data: bytes, head: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(kind, body) of each of netlink's messages, or of the attributes of one."""
    while data:
        length, kind = struct.unpack_from(head, data)
        yield kind, data[size:length]
        data = data[(length + 3) & ~3 :]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def observe() -> None:
    """The observer's process: a specification on the first line of stdin, a report on stdout when stdin ends."""
    spec = json.loads(sys.stdin.readline())
    addresses = Addresses(spec["hosts"], spec["vips"])
    probes = Probes(spec["client"], spec["vips"], spec["interval"], spec["late"])
    print("ready", flush=True)
    clients = list(probes.sockets.values())
    sources: list[Any] = [*addresses.sockets, *clients]
    ended, until = 0.0, float("inf")
    while (now := time.monotonic()) < until:
        wake = until if ended else probes.due
        for source in select.select([*sources, *([] if ended else [sys.stdin])], [], [], max(0.0, wake - now))[0]:
            if source is sys.stdin:
                ended = time.monotonic()
                until = ended + 0.3  # the last probes may still be answered
            else:
                (probes if source in clients else addresses).receive(source)
        if not ended:
            probes.send_due()
    report = {"probes": probes.report(ended), "bound": addresses.report(ended)}
    json.dump({"began": probes.began, "ended": ended, **report}, sys.stdout)


def respond(name: str) -> None:
    """The responder's process: answers each UDP probe with the host's name, from the address it was sent to."""
    kinds = [(socket.AF_INET, socket.IPPROTO_IP, 8, 8)]  # IP_PKTINFO, which the socket module does not name
    kinds.append((socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, socket.IPV6_PKTINFO))
    sockets = {}
    for family, level, receive, kind in kinds:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setsockopt(level, receive, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(level, socket.IPV6_V6ONLY, 1)
        sock.bind(("", PROBE_PORT))
        sockets[sock] = (level, kind)
    print("ready", flush=True)
    while True:
        for sock in select.select(list(sockets), [], [])[0]:
            level, kind = sockets[sock]
            with contextlib.suppress(OSError):  # the address may be gone again
                data, ancillary, _, peer = sock.recvmsg(256, 256)
                info = ancillary[0][2]
                source = struct.pack("=I4s4x", 0, info[8:12]) if kind == 8 else info[:16] + bytes(4)
                sock.sendmsg([data[:8] + name.encode()], [(level, kind, source)], 0, peer)


def relay(ends: Sequence[str], loss: float, delay: float, jitter: float) -> None:
    """The bad cable's process: hands frames over between two interfaces once stdin ends; see `Host.worsen`."""
    print("ready", flush=True)
    sys.stdin.read()
    socks = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in ends]
    for sock, name in zip(socks, ends, strict=True):
        sock.bind((name, 3))
        sock.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR: checksums yet to be made, segments yet to be cut
    late: list[tuple[float, int, socket.socket, bytes]] = []
    for number in itertools.count():
        for sock in select.select(socks, [], [], max(0.0, late[0][0] - time.monotonic()) if late else None)[0]:
            frame, address = sock.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING and random.random() >= loss:
                due = time.monotonic() + delay + random.uniform(-jitter, jitter)
                heapq.heappush(late, (due, 2 * number + socks.index(sock), socks[1 - socks.index(sock)], frame))
        while late and late[0][0] <= time.monotonic():
            with contextlib.suppress(OSError):  # the other end is down
                late[0][2].send(late[0][3])
            heapq.heappop(late)


# --------------------------------------------------------------------------------------------------- command line

if __name__ == "__main__":  # for the lab's own use: `observe`, `respond NAME`, `relay ONE OTHER LOSS DELAY JITTER`
    gc.disable()  # come before what is measured, and do not collect garbage meanwhile
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    match sys.argv[1:]:
        case ["observe"]:
            observe()
        case ["respond", name]:
            respond(name)
        case ["relay", one, other, *numbers]:
            relay([one, other], *map(float, numbers))
