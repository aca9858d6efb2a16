#!/usr/bin/env python3
"""Several hosts on one machine: namespaces, a real ZooKeeper, an observer; and the demo.

A host is a network namespace, its cable a veth pair, the LAN a bridge in a namespace of its own. Kernel, ARP,
addresses and timing are real; only the machines are not. Needs root and iproute2; ZooKeeper comes from Debian's
package. The order of the file: tools, ZooKeeper, the hosts, the lab, the observer, the demo, the command line.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import ctypes
import gc
import http.client
import ipaddress
import itertools
import json
import os
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
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

HERE = Path(__file__).resolve()
PROGRAM = HERE.with_name("link.py")
LEDGERS = Path("/run/link-lab")
NAMESPACES = Path("/run/netns")
CLIENT, ZOOKEEPER, OUTSIDE = 200, 250, 254  # the last byte of their addresses; a host's is its number
PROBE_PORT = 7777
NOWHERE = "02:4c:00:00:ff:ff"  # a hardware address that nobody has
T = TypeVar("T")
Span = tuple[float, float]
_serial = itertools.count(1)

# ---------------------------------------------------------------------------------------------------------- tools


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command and return its output; RuntimeError with its complaint if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}\n{stdin or ''}")
    return done.stdout


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
    result: list[T] = []
    problem: list[BaseException] = []

    def work() -> None:
        try:
            if namespace is not None:
                _enter(namespace)
            result.append(action())
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if problem:
        raise problem[0]
    return result[0]


def _enter(namespace: str) -> None:
    """Move the calling thread (and it alone) into a network namespace, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as handle:
        if libc.setns(handle.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def socket_in(namespace: str | None, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a socket inside a namespace; it stays there, wherever it is used. None is the caller's own."""
    return in_namespace(namespace, lambda: socket.socket(family, kind, protocol))


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


class Ledger:
    """What one lab has started, on disk, so that the next lab can clear up after one that was killed."""

    def __init__(self, prefix: str) -> None:
        """Open the ledger of this prefix: its processes, its namespaces and its directory."""
        LEDGERS.mkdir(mode=0o700, exist_ok=True)
        self.sweep()
        self.path = LEDGERS / prefix
        if self.path.exists():
            pid = self.path.read_text().split()[0]
            raise RuntimeError(f"another one is running already, as process {pid}: end it first (kill {pid})")
        self.directory = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
        self.path.write_text(f"{_identity(os.getpid())}\n{self.directory}\n")

    def spawn(self, command: Sequence[str], log: Path | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own and note it; with `log`, its output goes there."""
        if log:
            with log.open("ab") as out:
                options.update(stdout=out, stderr=subprocess.STDOUT)
                process = subprocess.Popen(command, start_new_session=True, **options)
        else:
            process = subprocess.Popen(command, start_new_session=True, **options)
        with self.path.open("a") as ledger:
            ledger.write(f"{_identity(process.pid)}\n")
        return process

    def close(self) -> None:
        """Kill every process in the ledger, delete the namespaces and the directory, and forget it all."""
        self._clear(self.path)

    @classmethod
    def sweep(cls) -> None:
        """Clear up after every lab whose own process is gone."""
        for path in LEDGERS.glob("*"):
            owner = path.read_text().partition("\n")[0]
            if owner != _identity(int(owner.split()[0])):
                cls._clear(path)

    @staticmethod
    def _clear(path: Path) -> None:
        _, directory, *processes = path.read_text().splitlines()
        for noted in processes:
            pid = int(noted.split()[0])
            if noted == _identity(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        if Path(f"/sys/class/net/{path.name}lan").exists():  # the demo's; a namespace takes its time to go
            run("ip", "link", "del", f"{path.name}lan")
        for namespace in NAMESPACES.glob(f"{path.name}*"):
            if re.fullmatch(r"sw|cl|zk|\d+", namespace.name.removeprefix(path.name)):
                run("ip", "netns", "del", namespace.name)
        shutil.rmtree(directory, ignore_errors=True)
        path.unlink(missing_ok=True)


def _identity(pid: int) -> str:
    """A process id with its start time, which together are never used again; "pid 0" if it is none or has ended."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if words[0] != "Z":
            return f"{pid} {words[19]}"
    return f"{pid} 0"


def _reap(process: subprocess.Popen[bytes] | None, sig: int = signal.SIGKILL, timeout: float = 10.0) -> None:
    """Signal a process and all it started, and wait for its end."""
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        process.wait(timeout)


# ------------------------------------------------------------------------------------------------------ ZooKeeper


class ZooKeeper:
    """Real ZooKeeper servers, of Debian's package; `count=3` makes an ensemble. A context manager.

    Servers are numbered from 0. `ledger` and `namespace` come from a Lab (use `Lab.zookeeper()`); without them the
    servers listen on loopback, on ports that were free.
    """

    JARS = "/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar"

    def __init__(
        self,
        namespace: str | None = None,
        address: str = "127.0.0.1",
        count: int = 1,
        tick: int = 500,
        fsync: bool = True,
        ledger: Ledger | None = None,
    ) -> None:
        """Configure and start the servers; `wait_ready` tells when they serve. `tick` in ms."""
        self.namespace, self.address, self.fsync, self.tick = namespace, address, fsync, tick
        self._own_ledger = None if ledger else Ledger(f"lkz{os.getpid()}x{next(_serial)}")
        self._ledger: Ledger = ledger or self._own_ledger  # type: ignore[assignment]
        self._ports = self._free_ports(count)
        self._directories = [Path(tempfile.mkdtemp(prefix="zk-", dir=self._ledger.directory)) for _ in range(count)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        for number in range(count):
            self._configure(number)
            self.start(number)

    @property
    def hosts(self) -> str:
        """The connect string."""
        return ",".join(f"{self.address}:{ports[0]}" for ports in self._ports)

    def start(self, number: int = 0) -> None:
        """Start one server (again)."""
        options = f"-Xmx96m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Xshare:auto -cp {self.JARS}"
        options += f" -Dzookeeper.forceSync={'yes' if self.fsync else 'no'} -Dzookeeper.preAllocSize=64"
        directory = self._directories[number]
        command = ["java", *options.split(), "org.apache.zookeeper.server.quorum.QuorumPeerMain", f"{directory}/cfg"]
        if self.namespace:
            command = ["ip", "netns", "exec", self.namespace, *command]
        self._processes[number] = self._ledger.spawn(command, directory / "log")

    def stop(self, number: int | None = None, sig: int = signal.SIGKILL) -> None:
        """End one server, or all."""
        for one in self._chosen(number):
            _reap(self._processes[one], sig)
            self._processes[one] = None

    def pause(self, number: int | None = None) -> None:
        """Hang one server, or all: connections stay open, nothing is answered."""
        self._signal(number, signal.SIGSTOP)

    def resume(self, number: int | None = None) -> None:
        """End a pause."""
        self._signal(number, signal.SIGCONT)

    def mode(self, number: int = 0) -> str:
        """What a server says it is: "standalone", "leader", "follower", or "" while it does not serve."""
        found = re.search(r"^Mode: (\w+)", self.ask("srvr", number), re.M)
        return found[1] if found else ""

    def ask(self, word: str, number: int = 0) -> str:
        """Send one of ZooKeeper's four-letter words and return the answer, "" if there is none."""
        with contextlib.suppress(OSError), socket_in(self.namespace, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            sock.connect((self.address, self._ports[number][0]))
            sock.sendall(word.encode())
            return sock.makefile().read()
        return ""

    def wait_ready(self, timeout: float = 30.0) -> ZooKeeper:
        """Wait until every started server serves."""
        started = [number for number, process in enumerate(self._processes) if process]
        wait_until(lambda: all(map(self.mode, started)), timeout, f"ZooKeeper ready\n{self.log()[-2000:]}")
        return self

    def wipe(self) -> None:
        """Stop every server and delete all data; start them again with `start`."""
        self.stop()
        for directory in self._directories:
            shutil.rmtree(directory / "data" / "version-2", ignore_errors=True)

    def log(self) -> str:
        """What the servers wrote."""
        return "\n".join((path / "log").read_text(errors="replace") for path in self._directories)

    def close(self) -> None:
        """Stop every server and delete what they wrote."""
        self.stop()
        if self._own_ledger:
            self._own_ledger.close()

    def __enter__(self) -> ZooKeeper:
        """Wait until it serves."""
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _chosen(self, number: int | None) -> Iterable[int]:
        return range(len(self._processes)) if number is None else [number]

    def _signal(self, number: int | None, sig: int) -> None:
        for one in self._chosen(number):
            if process := self._processes[one]:
                os.kill(process.pid, sig)

    def _free_ports(self, count: int) -> list[list[int]]:
        """Three ports for each server, as the system gives them out; kept open until all are known."""
        with contextlib.ExitStack() as stack:
            ports = []
            for _ in range(3 * count):
                sock = stack.enter_context(socket_in(self.namespace, socket.AF_INET, socket.SOCK_STREAM))
                sock.bind((self.address, 0))
                ports.append(sock.getsockname()[1])
            return [ports[3 * n : 3 * n + 3] for n in range(count)]

    def _configure(self, number: int) -> None:
        directory, ports = self._directories[number], self._ports[number]
        settings = {
            "tickTime": self.tick,
            "initLimit": 20,
            "syncLimit": 4,
            "minSessionTimeout": 2 * self.tick,
            "maxSessionTimeout": 60000,
            "maxClientCnxns": 0,
            "dataDir": directory / "data",
            "clientPortAddress": self.address,
            "clientPort": ports[0],
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
        }
        if len(self._ports) > 1:
            for n, (_, peer, election) in enumerate(self._ports, 1):
                settings[f"server.{n}"] = f"{self.address}:{peer}:{election}"
        (directory / "data").mkdir()
        (directory / "data" / "myid").write_text(str(number + 1))
        (directory / "cfg").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


# ---------------------------------------------------------------------------------------------------------- hosts


class Host:
    """One host of a lab: a namespace with a cable to the switch, an agent, and the responder that probes talk to.

    `presence` records when it left and rejoined the LAN (unplugged, isolated, off): (monotonic time, is it there).
    """

    def __init__(self, lab: Lab, number: int) -> None:
        """Describe host `number` of a lab; the lab makes it."""
        self.lab, self.number, self.name = lab, number, f"node{number}"
        self.namespace, self.interface, self.port = f"{lab.prefix}{number}", f"eth{9 + number}", f"p{number}"
        self.address, self.address6, self.mac = lab.address(number), lab.address6(number), lab.mac(number)
        self.directory = lab.directory / self.name
        self.config: dict[str, Any] = {}
        self.agent: subprocess.Popen[bytes] | None = None
        self.presence: list[tuple[float, bool]] = []
        self._responder: subprocess.Popen[bytes] | None = None
        self._faults: set[str] = set()
        self._cut: list[str] = []
        (self.directory / "state").mkdir(parents=True)
        self._new_boot_id()

    # the agent

    def start(self, program: Path = PROGRAM, **config: Any) -> Host:
        """Write the configuration (None leaves a default out) and start the agent; its pid is `agent.pid`."""
        defaults = {
            "hostname": self.name,
            "interface": self.interface,
            "state_dir": str(self.directory / "state"),
            "listen": "127.0.0.1:1313",
        }
        self.config = {key: value for key, value in {**defaults, **config}.items() if value is not None}
        self.config_path.write_text(json.dumps(self.config, indent=1))  # JSON is YAML
        # A power cycle must change the boot id; `ip netns exec` gives the mount a namespace of its own.
        script = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
        inside = ["sh", "-c", script, "sh", str(self.directory / "boot_id")]
        command = [*inside, sys.executable, str(program), "--config", str(self.config_path)]
        self.agent = self.lab.ledger.spawn(["ip", "netns", "exec", self.namespace, *command], self.log_path)
        return self

    @property
    def config_path(self) -> Path:
        """The agent's configuration file."""
        return self.directory / "link.yml"

    @property
    def log_path(self) -> Path:
        """Where the agent's output goes; it is kept from one start to the next."""
        return self.directory / "log"

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 15.0) -> tuple[int, float]:
        """Ask the agent to end and wait; its exit code and how long it took."""
        assert self.agent is not None, f"{self.name} has no agent"
        began = time.monotonic()
        self.kill(sig)
        return self.agent.wait(timeout), time.monotonic() - began

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send the agent a signal and do not wait."""
        assert self.agent is not None, f"{self.name} has no agent"
        os.kill(self.agent.pid, sig)

    def api(
        self, method: str, path: str, body: Any = None, timeout: float = 5.0, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Ask the agent's API: status and parsed answer (None if it is empty). A str or bytes body goes out as is."""
        host, _, port = self.config["listen"].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
        with contextlib.closing(connection), socket_in(self.namespace, socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect((host, int(port)))
            connection.sock = sock
            raw = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
            connection.request(method, path, raw, {**self._credentials(), **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text.strip() else None

    def _credentials(self) -> dict[str, str]:
        if "user" not in self.config:
            return {}
        token = base64.b64encode(f"{self.config['user']}:{self.config['password']}".encode()).decode()
        return {"Authorization": f"Basic {token}"}

    def log(self) -> str:
        """All that the agent has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_log(self, pattern: str, timeout: float = 5.0) -> re.Match[str]:
        """Wait until a line of the log matches."""
        found = wait_until(lambda: re.search(pattern, self.log(), re.M), timeout, f"{pattern!r} in {self.name}'s log")
        assert found
        return found

    # its addresses

    def addresses(self) -> set[str]:
        """Every address of the LAN interface, with its prefix length."""
        return {line.split()[3] for line in self.ip("-o", "addr", "show", "dev", self.interface).splitlines()}

    def add_address(self, address: str) -> None:
        """Add an address by hand."""
        self.ip("addr", "add", address, "dev", self.interface, *(["nodad"] if ":" in address else []))

    def del_address(self, address: str) -> None:
        """Delete an address by hand."""
        self.ip("addr", "del", address, "dev", self.interface)

    def ip(self, *words: str) -> str:
        """Run `ip` in this host."""
        return run("ip", "-n", self.namespace, *words)

    # faults

    def unplug(self) -> None:
        """Pull the cable: no carrier."""
        run("ip", "-n", self.lab.switch, "link", "set", self.port, "down")
        self._fault("unplugged", True)

    def plug(self) -> None:
        """Put the cable back."""
        self._fault("unplugged", False)
        run("ip", "-n", self.lab.switch, "link", "set", self.port, "up")
        if "isolated" in self._faults:
            self._bridge("state 0")

    def isolate(self) -> None:
        """Let no frame pass in either direction; the carrier stays."""
        self._bridge("state 0")
        self._fault("isolated", True)

    def deafen(self) -> None:
        """It hears nothing and can still send; the carrier stays. `heal` ends it."""
        self._bridge("learning off flood off mcast_flood off bcast_flood off")
        self._forget_mac()

    def mute(self) -> None:
        """It hears everything and nothing that it sends arrives; the carrier stays. `heal` ends it."""
        self._bridge("learning off locked on")
        self._forget_mac()

    def heal(self) -> None:
        """End `isolate`, `deafen` and `mute`."""
        self._fault("isolated", False)
        self._bridge("learning on flood on mcast_flood on bcast_flood on locked off")
        if "unplugged" not in self._faults:
            self._bridge("state 3")

    def cut_zookeeper(self, addresses: Sequence[str] = ()) -> None:
        """Lose every packet to and from ZooKeeper (or these addresses), silently; connections stay open, the LAN works.

        Both kernels are given a hardware address for each other that nobody has.
        """
        self._cut = list(addresses) or [self.lab.address(ZOOKEEPER)]
        for address in self._cut:
            self.ip("neigh", "replace", address, "lladdr", NOWHERE, "nud", "permanent", "dev", self.interface)
        words = f"replace {self.address} lladdr {NOWHERE} nud permanent dev eth0"
        run("ip", "-n", self.lab.zk, "neigh", *words.split())

    def mend_zookeeper(self) -> None:
        """End `cut_zookeeper`."""
        for address in self._cut:
            self.ip("neigh", "del", address, "dev", self.interface)
        run("ip", "-n", self.lab.zk, "neigh", "del", self.address, "dev", "eth0")
        self._cut = []

    def power_off(self) -> None:
        """The host dies: all at once, with no last word."""
        self.isolate()
        _reap(self.agent)
        _reap(self._responder)

    def power_on(self) -> None:
        """It is back, as after a boot: with its own addresses only, a new boot id and no agent yet."""
        own = {f"{self.address}/24", f"{self.address6}/64"}
        for address in self.addresses() - own:
            if not address.startswith("fe80:"):
                self.del_address(address)
        self._new_boot_id()
        self.start_responder()
        self.heal()

    def start_responder(self) -> None:
        """Start what answers the observer's probes, and wait for it."""
        command = [sys.executable, "-IS", str(HERE), "respond", self.name]
        inside = ["ip", "netns", "exec", self.namespace, *command]
        self._responder = self.lab.ledger.spawn(inside, stdout=subprocess.PIPE)
        assert self._responder.stdout is not None
        assert self._responder.stdout.readline(), f"the responder of {self.name} did not start"

    def _bridge(self, settings: str) -> None:
        run("bridge", "-n", self.lab.switch, "link", "set", "dev", self.port, *settings.split())

    def _forget_mac(self) -> None:
        words = f"link set dev {self.port} type bridge_slave fdb_flush"
        run("ip", "-n", self.lab.switch, *words.split())

    def _fault(self, name: str, present: bool) -> None:
        """Note a fault. It counts from when it is complete, and no longer once its end begins."""
        (self._faults.add if present else self._faults.discard)(name)
        self.presence.append((time.monotonic(), not self._faults))

    def _new_boot_id(self) -> None:
        (self.directory / "boot_id").write_text(f"{uuid.uuid4()}\n")


# ------------------------------------------------------------------------------------------------------------ lab


class Lab:
    """Hosts, a client and room for ZooKeeper on one LAN. A context manager: at its end everything is gone.

    `hosts[0]` is host 1: node1, namespace <prefix>1, interface eth10, 10.77.0.1/24, 02:4c:00:00:00:01.
    """

    def __init__(self, hosts: int = 3, ipv6: bool = True, prefix: str = "", subnet: str = "10.77.0") -> None:
        """Describe a lab; it is made when it is entered. `subnet` is the first three bytes of its /24."""
        self.prefix = prefix or f"lk{os.getpid()}x{next(_serial)}"
        self.count, self.ipv6, self.subnet = hosts, ipv6, subnet
        self.switch, self.client, self.zk = (self.prefix + role for role in ("sw", "cl", "zk"))
        self.hosts: list[Host] = []
        self._closing = contextlib.ExitStack()

    @property
    def directory(self) -> Path:
        """Where this lab keeps its files; removed at its end."""
        return self.ledger.directory

    def address(self, number: int) -> str:
        """The IPv4 address with this last byte."""
        return f"{self.subnet}.{number}"

    def address6(self, number: int) -> str:
        """The IPv6 address with this end."""
        return f"fd77::{number}"

    def mac(self, number: int) -> str:
        """The hardware address of this number."""
        return f"02:4c:00:00:00:{number:02x}"

    def zookeeper(self, count: int = 1, tick: int = 500, fsync: bool = True) -> ZooKeeper:
        """Start ZooKeeper on the LAN, in the namespace `zk`, and wait until it serves."""
        server = ZooKeeper(self.zk, self.address(ZOOKEEPER), count, tick, fsync, self.ledger)
        self._closing.enter_context(server)
        return server

    def at_end(self, action: Callable[[], object]) -> None:
        """Call this when the lab ends, before anything is removed."""
        self._closing.callback(action)

    def presence(self) -> dict[str, list[tuple[float, bool]]]:
        """When each host left and rejoined the LAN."""
        return {host.name: list(host.presence) for host in self.hosts}

    def __enter__(self) -> Lab:
        """Make it."""
        self.ledger = Ledger(self.prefix)
        self._closing.callback(self.ledger.close)
        try:
            self._make_switch()
            self.hosts = [Host(self, number) for number in range(1, self.count + 1)]
            for host in self.hosts:
                self._attach(host.namespace, host.interface, host.port, host.number)
            self._attach(self.client, "eth0", "pcl", CLIENT)
            self._attach(self.zk, "eth0", "pzk", ZOOKEEPER)
            for host in self.hosts:
                host.start_responder()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it: processes, namespaces, files."""
        self._closing.close()
        for host in self.hosts:
            _reap(host.agent)
            _reap(host._responder)

    def _make_switch(self) -> None:
        run("ip", "netns", "add", self.switch)
        set_sysctls(self.switch, {"ipv6.conf.default.disable_ipv6": 1, "ipv6.conf.all.disable_ipv6": 1})
        words = "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0 ageing_time 30000"
        run("ip", "-n", self.switch, *words.split())
        run("ip", "-n", self.switch, "link", "set", "br0", "up")

    def _attach(self, namespace: str, interface: str, port: str, number: int) -> None:
        """Make a namespace with a cable to the switch."""
        run("ip", "netns", "add", namespace)
        set_sysctls(namespace, self._settings())
        veth = f"link add name {port} netns {self.switch} type veth peer name {interface} netns {namespace}"
        run("ip", *veth.split(), "address", self.mac(number))
        run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        lines = ["link set lo up", f"link set {interface} up", f"addr add {self.address(number)}/24 dev {interface}"]
        if self.ipv6:
            lines.append(f"addr add {self.address6(number)}/64 dev {interface} nodad")
        run("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines))

    def _settings(self) -> dict[str, int]:
        settings = {"ipv4.ip_forward": 0}
        for scope in "all", "default":
            settings |= {
                f"ipv4.conf.{scope}.arp_ignore": 1,
                f"ipv6.conf.{scope}.disable_ipv6": int(not self.ipv6),
                f"ipv6.conf.{scope}.accept_dad": 0,
                f"ipv6.conf.{scope}.dad_transmits": 0,
                f"ipv6.conf.{scope}.router_solicitations": 0,
            }
        return settings


# ------------------------------------------------------------------------------------------------------- observer


class Result:
    """What an observer saw of one virtual IP, or of several at once. All times are CLOCK_MONOTONIC."""

    def __init__(self, raw: dict[str, Any], presence: dict[str, list[tuple[float, bool]]], vips: list[str]) -> None:
        """Read the observer's report; `presence` says which host was on the LAN when."""
        self.vips, self.began, self.ended = vips, raw["began"], raw["ended"]
        self._raw, self._presence = raw, presence

    def of(self, vip: str) -> Result:
        """The same for one virtual IP only."""
        return Result(self._raw, self._presence, [vip])

    @property
    def sent(self) -> int:
        """How many probes were sent."""
        return sum(self._raw["probes"][vip]["sent"] for vip in self.vips)

    @property
    def lost(self) -> int:
        """How many probes were never answered."""
        return sum(self._raw["probes"][vip]["lost"] for vip in self.vips)

    @property
    def outages(self) -> list[Span]:
        """When (start, end) at least one of the IPs was away for the client; see `Probes` for what that means."""
        return merge((a, b) for vip in self.vips for a, b in self._raw["probes"][vip]["outages"])

    @property
    def gaps(self) -> list[Span]:
        """The outages as (start, length)."""
        return [(start, end - start) for start, end in self.outages]

    @property
    def away(self) -> float:
        """The longest outage."""
        return max((length for _, length in self.gaps), default=0.0)

    @property
    def holders(self) -> list[tuple[str, float, float]]:
        """Who answered, in order: (host, first answer, last answer in a row). For several IPs, use `of`."""
        return [tuple(turn) for turn in self._raw["probes"][self.vips[0]]["holders"]]

    def bound(self, on_lan: bool = False) -> dict[str, list[Span]]:
        """When each host had the (first) IP bound; with `on_lan`, only while that host was on the LAN."""
        spans = {host: [(a, b) for a, b in found] for host, found in self._raw["bound"][self.vips[0]].items()}
        if on_lan:
            spans = {host: _common(found, self._there(host)) for host, found in spans.items()}
        return spans

    def holding(self, least: int, most: int, on_lan: bool = True) -> list[Span]:
        """When at least `least` and at most `most` hosts had the (first) IP bound at once."""
        edges = [(self.began, 0), (self.ended, 0)]
        for spans in self.bound(on_lan).values():
            edges += [edge for start, end in spans for edge in ((start, 1), (end, -1))]
        count, found = 0, []
        for (start, step), (end, _) in itertools.pairwise(sorted(edges)):
            count += step
            if least <= count <= most and end > start:
                found.append((start, end))
        return merge(found)

    def two_for(self, on_lan: bool = True) -> Span:
        """How long two or more hosts had an IP bound at once: (longest, total over all IPs)."""
        return self._lengths(2, len(self._presence), on_lan)

    def none_for(self, on_lan: bool = True) -> Span:
        """How long no host had an IP bound: (longest, total over all IPs)."""
        return self._lengths(0, 0, on_lan)

    def _lengths(self, least: int, most: int, on_lan: bool) -> Span:
        lengths = [b - a for vip in self.vips for a, b in self.of(vip).holding(least, most, on_lan)]
        return max(lengths, default=0.0), sum(lengths)

    def _there(self, host: str) -> list[Span]:
        """When a host was on the LAN."""
        changes = [(0.0, True), *self._presence[host], (self.ended, False)]
        return [(start, end) for (start, there), (end, _) in itertools.pairwise(changes) if there and end > start]


def _common(left: list[Span], right: list[Span]) -> list[Span]:
    """What two lists of spans have in common."""
    pairs = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return merge((start, end) for start, end in pairs if end > start)


class Observer:
    """Watches virtual IPs from the client and from every host's kernel, in a process of its own; a context manager.

    Inside `with Observer(lab, "10.77.0.100") as observer:` things happen; after it, `observer.result` tells. Each of
    the IPs is probed every `interval` s; with many IPs take a longer one (the limit is about 5000 probes a second).
    """

    def __init__(self, lab: Lab, vip: str | Sequence[str], interval: float = 0.005, late: float = 0.05) -> None:
        """Start watching; returns when the observer is ready. An answer after more than `late` s means "away"."""
        self.lab, self.vips = lab, [vip] if isinstance(vip, str) else list(vip)
        self._result: Result | None = None
        hosts = {host.name: host.namespace for host in lab.hosts}
        spec = {"client": lab.client, "hosts": hosts, "vips": self.vips, "interval": interval, "late": late}
        command = [sys.executable, "-IS", str(HERE), "observe"]
        self._process = lab.ledger.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "the observer did not start"

    def mark(self) -> float:
        """The time now, on the observer's clock."""
        return time.monotonic()

    def stop(self) -> Result:
        """End it and return what it saw; again and again the same."""
        if self._result is None:
            report, _ = self._process.communicate(timeout=60)
            self._result = Result(json.loads(report), self.lab.presence(), self.vips)
        return self._result

    @property
    def result(self) -> Result:
        """What it saw; ends it if it still watches."""
        return self.stop()

    def __enter__(self) -> Observer:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()


class Probes:
    """The observer's view from the client: a UDP probe to each IP every `interval` s, and who answers it.

    What "away" means: a client that asked at s and was answered at a has waited from s to a. If that is longer than
    `late`, the IP was away for him from s to a; if the answer never came, from s until the next probe. An outage is
    such spans joined. So it runs from the first request that had to wait until requests are answered promptly again,
    and it includes what the client's own kernel spends on finding the new hardware address.
    """

    def __init__(self, namespace: str, vips: list[str], interval: float, late: float) -> None:
        """Open the sockets in the client's namespace."""
        self.vips, self.interval, self.late, self._next = vips, interval, late, 0
        self.sockets = {4: socket_in(namespace, socket.AF_INET, socket.SOCK_DGRAM)}
        self.sockets[6] = socket_in(namespace, socket.AF_INET6, socket.SOCK_DGRAM)
        for sock in self.sockets.values():
            sock.setblocking(False)
            for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE: probes wait in the ARP queue
                sock.setsockopt(socket.SOL_SOCKET, option, 1 << 24)
        self._targets = [(self.sockets[6 if ":" in vip else 4], (vip, PROBE_PORT)) for vip in vips]
        self._pending: dict[int, float] = {}
        self._outages: list[list[Span]] = [[] for _ in vips]
        self._holders: list[list[list[Any]]] = [[] for _ in vips]
        self._sent: list[list[float]] = [[] for _ in vips]
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
            sock, target = self._targets[which]
            self._sent[which].append(time.monotonic())
            self._pending[number] = self._sent[which][-1]
            with contextlib.suppress(OSError):
                sock.sendto(struct.pack("!Q", number), target)

    def receive(self, sock: socket.socket) -> None:
        """Note the answers that have come."""
        with contextlib.suppress(OSError):
            while True:
                answer = sock.recv(256)
                now, number = time.monotonic(), struct.unpack_from("!Q", answer)[0]
                if (sent := self._pending.pop(number, None)) is not None:
                    self._answered(number % len(self.vips), answer[8:].decode(), sent, now)

    def _answered(self, which: int, host: str, sent: float, now: float) -> None:
        turns = self._holders[which]
        if turns and turns[-1][0] == host:
            turns[-1][2] = now
        else:
            turns.append([host, now, now])
        if now - sent > self.late:
            self._outages[which].append((sent, now))

    def report(self, ended: float) -> dict[str, Any]:
        """What was seen of each IP; a probe without an answer counts as lost."""
        lost = [0] * len(self.vips)
        for number, sent in self._pending.items():
            which = number % len(self.vips)
            lost[which] += 1
            times = [*self._sent[which], ended]
            self._outages[which].append((sent, times[bisect.bisect(times, sent, hi=len(times) - 1)]))
        return {
            vip: {
                "sent": len(self._sent[n]),
                "lost": lost[n],
                "outages": merge(self._outages[n], self.interval / 2),
                "holders": self._holders[n],
            }
            for n, vip in enumerate(self.vips)
        }


class Addresses:
    """The observer's view from the hosts: netlink's address events of each, beginning with what is there."""

    def __init__(self, namespaces: dict[str, str], vips: list[str]) -> None:
        """Subscribe in each namespace, then ask for a dump."""
        self._names = {socket.inet_pton(_family(vip), vip): vip for vip in vips}
        self._bound: dict[str, dict[str, list[list[float]]]] = {vip: {host: [] for host in namespaces} for vip in vips}
        self._indexes: dict[tuple[str, str], set[int]] = {}
        self.sockets = {self._subscribe(namespace): host for host, namespace in namespaces.items()}

    @staticmethod
    def _subscribe(namespace: str) -> socket.socket:
        sock = socket_in(namespace, socket.AF_NETLINK, socket.SOCK_RAW)
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE: a thousand IPs at once
        sock.bind((0, 0x10 | 0x100))  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
        sock.setblocking(False)
        sock.send(struct.pack("=IHHIIB7x", 24, 22, 0x301, 1, 0, 0))  # RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP
        return sock

    def receive(self, sock: socket.socket) -> None:
        """Read what one host's kernel has to say."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, now = sock.recv(1 << 17), time.monotonic()
                while data:
                    length, kind = struct.unpack_from("=IH", data)
                    if kind in (20, 21):  # RTM_NEWADDR, RTM_DELADDR
                        self._change(self.sockets[sock], kind == 20, data[16:length], now)
                    data = data[(length + 3) & ~3 :]

    def _change(self, host: str, new: bool, body: bytes, now: float) -> None:
        _, _, flags, _, index = struct.unpack_from("=BBBBI", body)
        values = dict(_attributes(body[8:]))
        if (vip := self._names.get(values.get(2, values.get(1, b"")))) is None:  # IFA_LOCAL, or IFA_ADDRESS
            return
        indexes, spans = self._indexes.setdefault((host, vip), set()), self._bound[vip][host]
        before = bool(indexes)
        (indexes.add if new and not flags & 0x48 else indexes.discard)(index)  # IFA_F_TENTATIVE, IFA_F_DADFAILED
        if indexes and not before:
            spans.append([now, float("inf")])
        elif before and not indexes:
            spans[-1][1] = now

    def report(self, now: float) -> dict[str, dict[str, list[list[float]]]]:
        """Since when and until when each host had each IP; what is still bound ends now."""
        return {
            vip: {host: [[start, min(end, now)] for start, end in spans] for host, spans in hosts.items()}
            for vip, hosts in self._bound.items()
        }


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a netlink message."""
    while data:
        length, kind = struct.unpack_from("=HH", data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def observe() -> None:
    """The observer's process: a specification on the first line of stdin, a report on stdout when stdin ends."""
    spec = json.loads(sys.stdin.readline())
    _measure_undisturbed()
    addresses = Addresses(spec["hosts"], spec["vips"])
    for sock in addresses.sockets:
        addresses.receive(sock)
    probes = Probes(spec["client"], spec["vips"], spec["interval"], spec["late"])
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        _watch(probes, addresses, until=float("inf"), sending=True)
    ended = time.monotonic()
    _watch(probes, addresses, until=ended + 0.3, sending=False)  # the last probes may still be answered
    times = {"began": probes.began, "ended": ended}
    json.dump({**times, "probes": probes.report(ended), "bound": addresses.report(ended)}, sys.stdout)


def _watch(probes: Probes, addresses: Addresses, until: float, sending: bool) -> None:
    """Send and listen until a time, or until stdin ends."""
    clients = list(probes.sockets.values())
    sources: list[Any] = [*addresses.sockets, *clients, *([sys.stdin] if sending else [])]
    while (now := time.monotonic()) < until:
        wake = min(until, probes.due) if sending else until
        ready, _, _ = select.select(sources, [], [], max(0.0, wake - now))
        for source in ready:
            if source is sys.stdin:
                return
            (probes if source in clients else addresses).receive(source)
        if sending:
            probes.send_due()


def respond(name: str) -> None:
    """The responder's process: answers each UDP probe with the host's name, from the address it was sent to."""
    _measure_undisturbed()
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
            with contextlib.suppress(OSError):  # the address may be gone again
                _answer(sock, *sockets[sock], name.encode())


def _answer(sock: socket.socket, level: int, kind: int, name: bytes) -> None:
    data, ancillary, _, peer = sock.recvmsg(256, 256)
    info = ancillary[0][2]
    source = struct.pack("=I4s4x", 0, info[8:12]) if kind == 8 else info[:16] + bytes(4)
    sock.sendmsg([data[:8] + name], [(level, kind, source)], 0, peer)


def _measure_undisturbed() -> None:
    """Come before what is measured, and do not collect garbage meanwhile."""
    gc.disable()
    with contextlib.suppress(PermissionError):
        os.nice(-10)


# ----------------------------------------------------------------------------------------------------------- demo

GUIDE = """
Three hosts are up: node1 {h1}, node2 {h2}, node3 {h3}. Try, in another terminal:

  # one virtual IP on all three hosts
  for n in 1 2 3; do curl -su link:link -X POST {net}.$n:1313/ips -d '{{"ip": "{vip}/32"}}'; done
  curl -su link:link {h1}:1313/ips        # who has it, as this host sees it: "bound", "wire", "reason"
  ping {vip}

  # pull the cable of node1 (of node2, node3: p2, p3), see who has it now, and put the cable back
  sudo ip netns exec {sw} ip link set p1 down
  sudo ip netns exec {sw} ip link set p1 up
{planned}
  # let the agent of node1 crash: it is started again after a second, as systemd would, and nothing moves
  sudo kill -9 {pid}        # the new one's id is in the log below

Ctrl-C ends the demo and removes everything. The logs:
"""
PLANNED = """
  # move it to node2, without a lost packet (needs ZooKeeper)
  curl -su link:link -X POST {h2}:1313/ips/{vip}/lock
"""


class Follower:
    """Prints what is appended to the agents' logs, one colour for each host."""

    COLOURS = (36, 33, 35, 32, 34, 31)

    def __init__(self, hosts: list[Host]) -> None:
        """Follow the logs of these hosts from their beginning."""
        self._files = [(host, host.log_path.open(errors="replace")) for host in hosts]
        self._colour = sys.stdout.isatty()

    def show(self) -> None:
        """Print what is new."""
        for host, file in self._files:
            for line in file:
                text = f"{host.name} | {line.rstrip()}"
                colour = self.COLOURS[host.number % len(self.COLOURS)]
                print(f"\033[{colour}m{text}\033[0m" if self._colour else text, flush=True)


class Demo:
    """Three hosts to play with, reachable from the machine itself."""

    def __init__(self, lab: Lab, zookeeper: bool) -> None:
        """Connect the machine to the lab's LAN and start the agents."""
        self._zookeeper = zookeeper
        self.lab, self._restarts = lab, dict.fromkeys(lab.hosts, float("inf"))
        run(*f"ip link add name {lab.prefix}lan type veth peer name pout netns {lab.switch}".split())
        run("ip", "-n", lab.switch, "link", "set", "pout", "master", "br0", "up")
        run("ip", "link", "set", f"{lab.prefix}lan", "address", lab.mac(OUTSIDE), "up")
        run("ip", "addr", "add", f"{lab.address(OUTSIDE)}/24", "dev", f"{lab.prefix}lan")
        config: dict[str, Any] = {"user": "link", "password": "link"}
        if zookeeper:
            print("starting ZooKeeper ...", flush=True)
            config["zookeeper"] = lab.zookeeper().hosts
        for host in lab.hosts:
            host.start(listen=f"{host.address}:1313", **config)
        self._follower = Follower(lab.hosts)

    def follow(self, until: float = float("inf")) -> None:
        """Wait for the agents, print the guide, then follow the logs until a time or a signal."""
        try:
            wait_until(lambda: all(map(self._serves, self.lab.hosts)), 15, "an answer from every agent")
            print(self._guide(), flush=True)
        finally:
            self._follower.show()
        while time.monotonic() < until:
            time.sleep(0.1)
            self._follower.show()
            for host in self.lab.hosts:
                self._supervise(host)

    def _supervise(self, host: Host) -> None:
        """Start an agent that has ended again after a second, as systemd would one that crashed."""
        if host.agent and host.agent.poll() is not None and self._restarts[host] == float("inf"):
            self._restarts[host] = time.monotonic() + 1
            print(f"{host.name}: the agent ended with {host.agent.returncode}, next start in 1 s", flush=True)
        elif time.monotonic() > self._restarts[host]:
            self._restarts[host] = float("inf")
            host.start(**host.config)
            assert host.agent
            print(f"{host.name}: the agent is process {host.agent.pid} now", flush=True)

    @staticmethod
    def _serves(host: Host) -> bool:
        if host.agent and host.agent.poll() is not None:
            raise RuntimeError(f"the agent of {host.name} has ended with {host.agent.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(host.api("GET", "/ips", timeout=1)[0] == http.HTTPStatus.OK)
        return False

    def _guide(self) -> str:
        lab, agent = self.lab, self.lab.hosts[0].agent
        names = {f"h{host.number}": host.address for host in lab.hosts}
        pid = agent.pid if agent else 0
        vip = lab.address(100)
        planned = PLANNED.format(**names, vip=vip) if self._zookeeper else ""
        return GUIDE.format(**names, net=lab.subnet, vip=vip, sw=lab.switch, pid=pid, planned=planned)


def free_subnet() -> str:
    """The first three bytes of a /24 that this machine does not use."""
    words = " ".join(run("ip", "-4", "route", "show", "table", "all").splitlines()).split()
    used = [ipaddress.ip_network(word, strict=False) for word in words if re.fullmatch(r"[\d.]+\.\d+(/\d+)?", word)]
    for subnet in ("10.77.0", "10.78.0", "172.30.77", "192.168.177"):
        if not any(ipaddress.ip_network(f"{subnet}.0/24").overlaps(network) for network in used):
            return subnet
    raise RuntimeError("no free subnet for the demo")


def say_goodbye() -> None:
    """On a terminal that may be gone."""
    with contextlib.suppress(OSError):
        print("removing the demo: hosts, switch, processes and files", flush=True)


def demo(zookeeper: bool, exit_after: float) -> None:
    """Run the demo until Ctrl-C, SIGTERM, the end of the terminal or `exit_after` s."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
    Ledger.sweep()  # before the look for a free subnet: a killed demo still uses one
    try:
        with Lab(prefix="link", subnet=free_subnet()) as lab, contextlib.suppress(KeyboardInterrupt):
            lab.at_end(say_goodbye)
            Demo(lab, zookeeper).follow(time.monotonic() + exit_after)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"lab.py: {error}")


# --------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `observe` and `respond` are for the lab's own use."""
    parser = argparse.ArgumentParser(description="LinK's lab: several hosts on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    option = commands.add_parser("demo", help="three hosts to play with; Ctrl-C removes them")
    option.add_argument("--zookeeper", action="store_true", help="with a private ZooKeeper")
    option.add_argument("--exit-after", type=float, default=float("inf"), metavar="SECONDS", help="then end by itself")
    commands.add_parser("observe", help="watch virtual IPs (used by Observer)")
    commands.add_parser("respond", help="answer probes (used by Host)").add_argument("name")
    chosen = vars(parser.parse_args(arguments))
    actions: dict[str, Callable[..., None]] = {"demo": demo, "observe": observe, "respond": respond}
    actions[chosen.pop("command")](**chosen)


if __name__ == "__main__":
    main()
