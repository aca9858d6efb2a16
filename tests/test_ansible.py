"""The Ansible roles, the unit and the Vagrant files: first what can be read, then three real hosts with systemd.

The hosts are systemd-nspawn containers over one tree of Debian packages, on the switch of a Lab (a namespace of its
own), reached by SSH from the lab's client. Needs root, mmdebstrap, systemd-container, openssh-client and Ansible.
LINK_TREE=/a/directory keeps the tree from one run to the next. LINK_SUITE=trixie makes Debian 13 of them; `-m
every_suite` is the shorter half of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import lab
from scenarios import Cluster, next_version

HERE = Path(__file__).resolve().parents[1]
ANSIBLE = HERE / "ansible"
SUITE = os.environ.get("LINK_SUITE", "bookworm")
every_suite = pytest.mark.every_suite
ROLES = [ANSIBLE / "roles" / name for name in ("link", "zookeeper")]
VIP, VIP6 = "10.77.0.100", "fd77::100"
TOOLS = ("mmdebstrap", "systemd-nspawn", "ssh", "ssh-keygen", "nsenter")
LATER = "libzookeeper-java libslf4j-java default-jre-headless python3-venv python3-packaging"  # by the playbook
PACKAGES = "systemd-sysv,dbus,openssh-server,sudo,python3,python3-apt,iproute2,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def tool(name: str) -> str:
    """The path of a program, beside this Python or on the PATH; skips the test where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"NOT TESTED: {name} is not installed")
    return found


def output_of(*command: str, cwd: Path = HERE, fails: bool = False, **environment: str) -> str:
    """What a command prints, both streams; asserts that it succeeds (or fails)."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert bool(done.returncode) == fails, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# ------------------------------------------------------------------------------------------- what can be read


def test_the_roles_pass_ansible_lint_at_its_strictest_profile() -> None:
    environment = {"ANSIBLE_HOME": "/tmp/.ansible-link", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = output_of(tool("ansible-lint"), "--nocolor", cwd=ANSIBLE, **environment)
    shutil.rmtree(ANSIBLE / ".ansible", ignore_errors=True)
    assert "'production' was required, and it passed" in said
    config = (ANSIBLE / ".ansible-lint").read_text()
    assert "skip_list" not in config and "warn_list" not in config
    assert "noqa" not in "".join(path.read_text() for path in ANSIBLE.rglob("*.yml"))


def test_the_yaml_files_pass_yamllint() -> None:
    output_of(tool("yamllint"), "--strict", ".", cwd=ANSIBLE)


def test_a_variable_of_a_role_stands_in_its_defaults_its_argument_specs_and_the_readme() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", (ANSIBLE / "README.md").read_text(), re.M))
    for role in ROLES:
        defaults = load(role / "defaults/main.yml")
        assert (
            load(role / "meta/argument_specs.yml")["argument_specs"]["preflight"]["options"].keys() == defaults.keys()
        )
        assert all(name.startswith(role.name + "_") for name in defaults)
        for name, default in defaults.items():
            row = rows.pop(name)  # a default that is found out is told in words
            assert "{{" in str(default) or yaml.safe_load(row) == default, name
    assert rows.keys() == {"link_state", "zookeeper_state"}


def test_no_expression_names_the_file_of_a_role_that_a_task_includes() -> None:
    """Hosts of one play would all run the file of the one that answers first, whatever it says for each of them."""
    for path in ANSIBLE.rglob("*.yml"):
        assert not re.search(r"_from: .*\{\{", path.read_text()), path


def test_the_pinned_packages_are_those_of_requirements_txt() -> None:
    pinned = dict(item.split("==") for item in load(ROLES[0] / "defaults/main.yml")["link_requirements"])
    wanted = re.findall(r"^([A-Za-z0-9_-]+)>=([\d.]+),<([\d.]+)$", (HERE / "requirements.txt").read_text(), re.M)
    assert sorted(pinned) == sorted(name for name, _, _ in wanted)
    for name, low, high in wanted:
        assert Version(low) <= Version(pinned[name]) < Version(high), name


def test_the_unit_scores_at_most_two(tmp_path: Path) -> None:
    text = (ROLES[0] / "templates/link.service.j2").read_text()
    text = re.sub(r"\{\{ (\w+)[^}]*\}\}", lambda m: {"link_watchdog": "5"}.get(m[1], "link"), text)
    text = re.sub("^(User|Group)=link$", r"\1=daemon", text, flags=re.M)
    (tmp_path / "link.service").write_text(text.partition("\n")[2])
    said = output_of(tool("systemd-analyze"), "security", "--offline=true", str(tmp_path / "link.service"))
    score = re.search(r"exposure level for link.service: ([\d.]+)", said)
    assert score and float(score[1]) <= 2.0


def test_the_shell_scripts_pass_shellcheck() -> None:
    output_of(tool("shellcheck"), *map(str, (HERE / "vagrant").glob("*.sh")))


def test_start_sh_makes_its_virtual_environment_anew_when_the_python_under_it_is_another(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("NOT TESTED: start.sh needs root")
    for name in "start.sh", "link.py", "requirements.txt":
        shutil.copy(HERE / name, tmp_path)
    output_of("/usr/bin/python3", "-m", "venv", str(tmp_path / ".venv"))
    packages = next((tmp_path / ".venv/lib").iterdir())
    packages.rename(packages.with_name("python3.0"))  # what a dist-upgrade leaves: another Python looks elsewhere
    said = output_of(str(tmp_path / "start.sh"), "--version", cwd=tmp_path)
    assert "installing the Python packages" in said and "LinK" in said
    assert output_of(str(tmp_path / "start.sh"), "--version", cwd=tmp_path).startswith("LinK")


def test_the_vagrantfile_is_short_and_valid(tmp_path: Path) -> None:
    assert len((HERE / "Vagrantfile").read_text().splitlines()) <= 70
    vagrant = tool("vagrant")
    output_of(vagrant, "validate", "--ignore-provider", HOME=str(tmp_path), VAGRANT_HOME=str(tmp_path / "vagrant"))


# ----------------------------------------------------------------------------------------------- three hosts


async def proxy(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
    """An HTTP proxy that listens on the lab's LAN and connects from outside it: the hosts' way to packages."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
        writer.close()

    with contextlib.suppress(OSError, ValueError, EOFError):
        head = await client.readuntil(b"\r\n\r\n")
        method, target = head.split()[:2]
        place = target if method == b"CONNECT" else target.split(b"/")[2]
        host, _, port = place.decode().partition(":")
        server, ask = await asyncio.open_connection(host, int(port or 80))
        if method == b"CONNECT":
            answer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            ask.write(head)
        await asyncio.gather(copy(client, ask), copy(server, answer))


def overlay(tree: Path, where: Path) -> tuple[Path, list[str]]:
    """A root directory over the shared tree, and the command that mounts it."""
    upper, work, root = layers = [where / name for name in ("upper", "work", "root")]
    for layer in layers:
        layer.mkdir()
    options = f"lowerdir={tree},upperdir={upper},workdir={work}"
    return root, ["mount", "-t", "overlay", "overlay", "-o", options, str(root)]


class Container(lab.Host):
    """A host with an init system: a systemd-nspawn container over the shared tree."""

    alive = True  # its agent: systemd sees to that
    state = "present"  # whether the playbook is to put LinK on it

    def __init__(self, site: Site, number: int) -> None:
        super().__init__(site.lab, number)
        self.port, self.log_path = f"vb-{self.name}", self.directory / "console"
        self.config = {"listen": "127.0.0.1:1313"}
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0
        root, self.mount = overlay(site.tree, self.directory)
        site.lab.at_end.callback(self._end)
        lab.run(*self.mount)
        shutil.copy(CERTIFICATES, root / "etc/ssl/certs")
        files = {
            "etc/hostname": self.name,
            "etc/apt/apt.conf.d/proxy": f'Acquire::http::Proxy "{site.proxy}";',
            "etc/dpkg/dpkg.cfg.d/quick": "force-unsafe-io",  # no power failure will find them
            "etc/pip.conf": f"[global]\nproxy = {site.proxy}\ncert = {CERTIFICATES}",
            "root/.ssh/authorized_keys": site.key.with_suffix(".pub").read_text(),
            "etc/machine-id": "",
            # as Debian's installer writes it: whoever asks for his own name is told an address of loopback
            "etc/hosts": "\n".join(
                [
                    "127.0.0.1 localhost",
                    f"127.0.1.1 {self.name}",
                    *(f"{site.lab.address6(other)} node{other}" for other in (1, 2, 3) if other != number),
                ]
            ),
        }
        for name, text in files.items():
            (root / name).parent.mkdir(mode=0o700, exist_ok=True)
            (root / name).write_text(text + "\n" if text else "")
        lab.run("umount", str(root))

    @property
    def root(self) -> Path:
        """Its root directory, while it runs."""
        return Path(f"/proc/{self.leader}/root")

    def boot(self) -> None:
        """Start it, and wait until SSH answers."""
        options = ["--quiet", "--boot", "--register=no", "--keep-unit", "--resolv-conf=off", "--timezone=off"]
        options += ["--console=pipe", "-D", self.mount[-1], "-M", self.name, "--network-bridge=br0"]
        # Mounted where only the container sees it: with its last process the mount is gone, too.
        private = ["unshare", "--mount", "sh", "-c", f'{shlex.join(self.mount)} && exec systemd-nspawn "$@"', "sh"]
        command = ["nsenter", f"--net=/run/netns/{self.lab.switch}", *private, *options]
        self._nspawn = self.lab.spawn(command, self.log_path, stdin=subprocess.DEVNULL)
        self.leader = lab.wait_until(self._find_leader, 20, f"the first process of {self.name}")
        lab.run("ip", "netns", "attach", self.namespace, str(self.leader))
        card = f"link set host0 down name {self.interface} address {self.mac}", f"link set {self.interface} up"
        own = f"addr add {self.address}/24 dev", f"addr add {self.address6}/64 nodad dev"
        lab.ip(self.namespace, *card, *(f"{address} {self.interface}" for address in own))
        self.start_responder()
        lab.wait_until(self._answers, 60, f"SSH on {self.name}\n{self.log()[-2000:]}")

    def _find_leader(self) -> int:
        """The container's init, once it has its network."""
        assert self._nspawn is not None and self._nspawn.poll() is None, self.log()
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                inside = Path(f"/proc/{child}/comm").read_text().strip() == "systemd"
                if inside and "host0" in lab.run("nsenter", "-t", str(child), "-n", "ip", "-o", "link"):
                    return child
        return 0

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), lab.connect(self.lab.client, self.address, 22) as sock:
            return sock.recv(3) == b"SSH"
        return False

    def sh(self, command: str) -> str:
        """Run a shell command inside, as root."""
        return lab.run("nsenter", "-t", str(self.leader), "-a", "sh", "-c", command).strip()

    def die(self) -> None:
        """Off the LAN, and every process killed: what a power failure is."""
        self.isolate()
        self._end()
        self.leader = 0

    def _end(self) -> None:
        """Kill it, and wait for its end."""
        if self._nspawn is not None and self._nspawn.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader or self._nspawn.pid, signal.SIGKILL if self.leader else signal.SIGTERM)
            self._nspawn.wait(20)

    def revive(self) -> None:
        """Boot it again after `die`."""
        lab.reap(self._responder)
        lab.run("ip", "netns", "del", self.namespace)
        self.boot()
        self.presence.append((time.monotonic(), True))

    def property(self, name: str, unit: str = "link") -> str:
        return self.sh(f"systemctl show --property={name} --value {unit}")

    def mode(self) -> str:
        """What its ZooKeeper says it is."""
        return lab.zookeeper_mode(self.lab.client, self.address)


class Site(Cluster):
    """Three hosts, and the playbook run against them from the lab's client."""

    def __init__(self, world: lab.Lab, tree: Path) -> None:
        super().__init__(world)
        self.zk, self.tree, self.key, self.control = True, tree, world.directory / "key", world.directory / "c"
        lab.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        address, loop = world.address6(lab.ZOOKEEPER), asyncio.new_event_loop()
        listener = lab.in_namespace(world.zk, lambda: socket.create_server((address, 0), family=socket.AF_INET6))
        self.proxy = f"http://[{address}]:{listener.getsockname()[1]}"
        loop.run_until_complete(asyncio.start_server(proxy, sock=listener, limit=1 << 20))
        threading.Thread(target=loop.run_forever, daemon=True).start()
        world.at_end.callback(lambda: loop.call_soon_threadsafe(loop.stop))
        world.hosts.extend(Container(self, number) for number in (1, 2, 3))
        self.names = world.directory / "hosts"  # /etc/hosts of who runs the playbook
        self.names.write_text("".join(f"{host.address6} {host.name}\n" for host in world.hosts))
        self.control.mkdir(mode=0o700)
        self.program.write_text(self.source)  # as it is now: somebody may be at work on it
        self.bare: list[set[str]] = []
        self.vip = VIP
        # a host's line in the inventory; link_interface is what only a test needs
        self.line = "{0.name} ansible_host={0.address} link_interface={0.interface} link_state={0.state}"
        self.variables: dict[str, Any] = {"link_ips": [{"ip": f"{VIP}/32"}], "link_source": str(self.program)}

    def play(
        self, *arguments: str, book: str = "site.yml", without: str = "", fails: bool = False, line: str = "",
        **variables: Any,
    ) -> Play:  # fmt: skip
        """Run a playbook; `variables` are for this time only, and so is a host's `line` in the inventory."""
        hosts = [(line or self.line).format(host) for host in self.hosts if host.name != without]
        lines = ["[link]", *hosts, "[link:vars]", f"ansible_ssh_private_key_file={self.key}", "ansible_user=root"]
        inventory, told = self.lab.directory / "inventory.ini", self.lab.directory / "variables.json"
        inventory.write_text("\n".join(lines) + "\n")
        told.write_text(json.dumps({**self.variables, **variables}))  # not on the command line: Ansible may show that
        environment = {
            "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
            "ANSIBLE_HOME": str(self.lab.directory / "ansible"),
            "ANSIBLE_HOST_KEY_CHECKING": "false",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.control),
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=120s -o UserKnownHostsFile=/dev/null",
            "ANSIBLE_NOCOLOR": "1",
        }
        inside = ["nsenter", f"--net=/run/netns/{self.lab.client}", "unshare", "--mount", "sh", "-c"]
        inside += [f'mount --bind {self.names} /etc/hosts && exec "$@"', "sh", tool("ansible-playbook"), "-i"]
        return Play(output_of(*inside, str(inventory), str(ANSIBLE / book), "-e", f"@{told}", *arguments, fails=fails,
                              **environment))  # fmt: skip

    def healthy(self) -> Any:
        """One holder, two standbys, all healthy and three servers: as it should be. Returns the holder."""

        def fine() -> bool:
            with contextlib.suppress(OSError):
                return all(host.mode() and host.api("GET", "/health")[0] == 200 for host in self.hosts)
            return False

        lab.wait_until(fine, 60, "three servers, three healthy agents")
        return self.settled(self.vip, 60)[0]

    def each(self, *arguments: str) -> list[str]:
        """A property of a unit, of each host."""
        return [host.property(*arguments) for host in self.hosts]


class Play:
    """What a run of the playbook said."""

    def __init__(self, text: str) -> None:
        self.text, self.sentence = text, " ".join(text.split())
        recap = re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", text, re.M)
        self.changed = {host: int(changed) for host, changed, _, _ in recap}
        self.failed = {host for host, _, unreachable, failed in recap if int(unreachable) + int(failed)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three bare hosts and a client."""
    if os.geteuid():
        pytest.skip("NOT TESTED: hosts in containers need root")
    for name in ("ansible-playbook", *TOOLS):
        tool(name)
    kept = os.environ.get("LINK_TREE")
    tree = Path(kept) if kept else tmp_path_factory.mktemp("debian") / "tree"
    if not tree.exists():  # Debian's packages as a bare server has them, unpacked
        sources = [str(file) for file in Path("/etc/apt/sources.list.d").glob("debian.sources")]
        sources = sources if SUITE == "bookworm" else [debian(SUITE)]
        options = ["--variant=minbase", "--skip=cleanup/apt/lists", f"--include={PACKAGES}", "--quiet"]
        # what the playbook installs is fetched once, not by each host
        fetch = f'chroot "$1" apt-get --yes -qq --download-only --no-install-recommends install {LATER}'
        options += ["--skip=cleanup/apt/cache", f"--customize-hook={fetch}"]
        unfinished = tree.with_name(f"{tree.name}.{os.getpid()}")
        output_of(tool("mmdebstrap"), *options, SUITE, str(unfinished), *sources)
        unfinished.rename(tree)
    root, mount = overlay(tree, tmp_path_factory.mktemp("container"))
    inside = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "-D", str(root)]
    try:
        lab.run(*mount)
        try:
            lab.run(*inside, "/bin/true")
        finally:
            lab.run("umount", str(root))
    except RuntimeError as error:
        pytest.skip(f"NOT TESTED: no hosts in containers on this machine: {error}")
    with lab.Lab(hosts=0) as world:
        hosts = Site(world, tree)
        for host in hosts.hosts:
            host.boot()
        yield hosts


def debian(suite: str) -> str:
    """A line of apt sources."""
    own = Path("/etc/apt/sources.list.d/debian.sources")
    found = re.search(r"^URIs: (\S+)", own.read_text() if own.exists() else "", re.M)
    return f"deb {found[1] if found else 'http://deb.debian.org/debian'} {suite} main"


def belongings(host: Container) -> set[str]:
    """Users, groups, units, addresses and files of a host, but for what Debian's packages bring or make."""
    look = "cut -d: -f1,3 /etc/passwd /etc/group; systemctl list-unit-files --no-legend | cut -d' ' -f1; ip -o addr"
    files = "find /etc /home /opt /root /run /srv /usr /var/lib -xdev ! -lname '/etc/alternatives/*'"
    owned = set(host.sh("cat /var/lib/dpkg/info/*.list").splitlines())
    noise = r"/var/lib/(apt|dpkg|systemd|dbus|private)|/etc/(machine-id|resolv.conf|alternatives|ld.so.cache)"
    noise += r"|/etc/(ssl/certs/java|\.java|fonts)|/usr/.*(__pycache__|\.cache)|/usr/(local/)?share/(man|fonts)"
    noise += r"|/root/.ansible|/run/(?!link)"
    there = {
        re.sub(r" tentative| (valid_lft|preferred_lft) .*", "", line)
        for line in host.sh(f"{look}; {files}").splitlines()
    }
    return {line for line in there - owned if not re.match(noise, line)}


def untouched(site: Site) -> list[str]:
    """All that a playbook could leave on a host: packages, users, files outside the run directories."""
    look = "dpkg-query -W; cat /etc/passwd; find /etc /opt /var/lib /usr -xdev -newer /etc/machine-id -type f | sort"
    noise = re.compile(r"/var/lib/(systemd|dbus|private)|/etc/(machine-id|resolv.conf)")
    return ["\n".join(li for li in host.sh(look).splitlines() if not noise.search(li)) for host in site.hosts]


PORT = "ip link add br9 type bridge; ip link add p9 type veth peer name q9; ip link set p9 up master br9"
WRONG: dict[str, tuple[dict[str, Any], str]] = {  # what is said to the playbook; "do" and "undo": first, on each host
    "no such interface": (
        {"link_interface": "eth9"},
        r'has no interface "eth9"\. Set link_interface to .* one of: eth1',
    ),
    "no default route": (
        {"line": "{0.name} ansible_host={0.address}", "do": PORT, "undo": "ip link del br9; ip link del p9"},
        r"has no default route, .* Set link_interface to the one that carries the virtual IPs, one of: br9, eth1\d, p9",
    ),
    "port of a bridge": (
        {"link_interface": "p9", "do": PORT, "undo": "ip link del br9; ip link del p9"},
        r"node1: p9: p9 is a port of br9: use br9",
    ),
    "two hosts of one name": (
        {"do": "hostname node1", "undo": "hostname -F /etc/hostname"},
        r"node1 and node2, node3 are both called node1: .* with hostnamectl, or set hostname in link_config",
    ),
    "no such key": (
        {"link_config": {"probe_intervall": 0.1}},
        r"link\.yml: unknown key 'probe_intervall'; see link\.py --help for the keys",
    ),
    "value that cannot be": (
        {"link_config": {"probe_count": 1}},
        r"node1: probe_count: one lost packet is no silence; use 0, or 2 or more",
    ),
    "API open to everybody": (
        {"link_config": {"listen": "0.0.0.0:1313"}},
        r"user: required with password because listen \(0\.0\.0\.0:1313\) is not loopback",
    ),
    "variable of an earlier version": (
        {"link_session_timeout": 5},
        r"link_session_timeout is no variable .* goes into link_config, as in link_config: {session_timeout: …}",
    ),
    "setting of an earlier version": (
        {"zookeeper_sync_limit": 5},
        r"zookeeper_sync_limit is no variable .* goes into zookeeper_config, as in zookeeper_config: {syncLimit: 4}",
    ),
    "servers known by loopback only": (
        {"zookeeper_address": "localhost"},
        r"node1 has no address for localhost, or only one of loopback\. Set zookeeper_address of that host",
    ),
    "address of a host": (
        {"link_ips": [{"ip": "10.77.0.2/32"}]},
        r"link_ips: 10\.77\.0\.2 is the own address of a host\. .* choose a free one",
    ),
    "even ensemble": ({"without": "node3"}, r"The group zookeeper has 2 hosts\. .* add a host .* or take one out"),
    "old Python": ({"link_python": "/usr/local/bin/python3.9"}, r"is Python 3\.9; LinK needs 3\.11 .* set link_python"),
    "unreachable ZooKeeper": (
        {"link_zookeeper": "10.77.0.200:2181"},
        r"reaches 0 of the 1 ZooKeeper servers .*not 10.77.0.200:2181, .* Start them, .* or correct link_zookeeper",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_input_stops_at_preflight_with_a_sentence_and_the_hosts_are_untouched(site: Site, wrong: str) -> None:
    variables, sentence = WRONG[wrong]
    variables = dict(variables)
    undo = variables.pop("undo", "")
    do = variables.pop(
        "do", "cd /usr/local/bin; printf '#!/bin/sh\\ncat >/dev/null; echo 3.9\\n' >python3.9; chmod +x python3.9"
    )
    for host in site.hosts:
        host.sh(do)
    before = untouched(site)
    said = site.play(fails=True, **variables)
    for host in site.hosts:
        host.sh(undo)
    assert re.search(sentence, said.sentence), said.text
    assert not any(said.changed.values())
    assert untouched(site) == before


def test_a_dry_run_on_bare_hosts_works_and_changes_nothing(site: Site) -> None:
    before = untouched(site)
    said = site.play("--check", "--diff")
    assert not said.failed and all(said.changed.values()), said.text
    assert untouched(site) == before


@pytest.fixture(scope="module")
def converged(site: Site) -> Site:
    """The playbook has run, from nothing."""
    site.bare = [belongings(host) for host in site.hosts]
    said = site.play()
    assert not said.failed and f"{VIP}/32: ACTIVATED" in said.sentence, said.text
    site.healthy()
    return site


@every_suite
def test_one_playbook_makes_an_ensemble_three_healthy_agents_and_a_bound_ip(converged: Site) -> None:
    assert sorted(host.mode() for host in converged.hosts) == ["follower", "follower", "leader"]
    for host in converged.hosts:
        status, body = host.api("GET", "/health")
        assert status == 200 and body["zookeeper"]["state"] == "connected"
        assert host.property("ActiveState") == "active" and host.property("UnitFileState") == "enabled"
        assert host.property("UnitFileState", "zookeeper") == "enabled"
        assert host.property("LimitNOFILE") == "65536"
        for unit in "link", "zookeeper":  # one dead card does not delay the boot
            assert "network-online" not in host.property("After", unit) + host.property("Wants", unit)
        modes = host.sh("stat -c '%a %U %G' /etc/link/link.yml /opt/link/link.py").splitlines()
        assert modes == ["640 root link", "755 root root"]
    assert len(converged.bound(VIP)) == 1
    with converged.watch(VIP, lost=0) as observer:
        time.sleep(1)
    assert observer.result.sent > 100


@every_suite
def test_a_second_run_changes_nothing(converged: Site) -> None:
    before = converged.each("ExecMainStartTimestampMonotonic")
    said = converged.play()
    assert said.changed == {"node1": 0, "node2": 0, "node3": 0}, said.text
    assert converged.each("ExecMainStartTimestampMonotonic") == before


@every_suite
def test_the_agent_has_two_capabilities_no_root_and_writes_nowhere_but_in_its_own_directories(converged: Site) -> None:
    host = converged.hosts[0]
    pid = host.property("MainPID")
    status = dict(line.split(":\t") for line in host.sh(f"cat /proc/{pid}/status").splitlines())
    uid, gid = status["Uid"].split(), status["Gid"].split()
    assert len(set(uid)) == len(set(gid)) == 1 and "0" not in (uid[0], gid[0])
    assert host.sh("id -u link") == uid[0] and status["Groups"].split() in ([], [gid[0]])
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 1 << 12 | 1 << 13, f"{kind} is not CAP_NET_ADMIN and CAP_NET_RAW"
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    inside = f"nsenter -t {pid} --mount -S {uid[0]} -G {gid[0]}"
    find = r"find / -path /proc -prune -o -writable ! -type l ! -type c ! -type s -print 2>/dev/null || true"
    writable = set(host.sh(f"{inside} {find}").splitlines())
    assert "/var/lib/link" in writable
    assert not [path for path in writable if not path.startswith(("/var/lib/link", "/run/link"))]
    for path in ("/opt/link/link.py", "/opt/link/venv/bin/python", "/etc/link/link.yml"):
        host.sh(f"! {inside} test -w {path}")


# ------------------------------------------------------------- what a client sees, asking every 5 ms


@every_suite
def test_a_rolling_upgrade_by_the_playbook_loses_nothing(converged: Site) -> None:
    holder, pids = converged.healthy(), converged.each("MainPID")
    version = next_version(converged)
    with converged.watch(VIP, lost=0):
        said = converged.play()
        converged.healthy()
    assert all(said.changed.values())
    assert [host.api("GET", "/version")[1]["version"] for host in converged.hosts] == [version] * 3
    assert converged.each("MainPID") == pids and converged.bound(VIP) == [holder]


def test_changed_variables_and_with_them_a_rolling_restart_of_zookeeper_lose_nothing(converged: Site) -> None:
    holder, pids, servers = converged.healthy(), converged.each("MainPID"), converged.each("MainPID", "zookeeper")
    converged.variables |= {
        "link_config": {"session_timeout": 5.0}, "zookeeper_config": {"autopurge.snapRetainCount": 5},
    }  # fmt: skip
    with converged.watch(VIP, lost=0) as observer:
        said = converged.play()
        assert converged.healthy() is holder
    assert len(observer.result.holders) == 1 and not said.failed
    assert converged.each("MainPID") == pids
    for host, server in zip(converged.hosts, servers, strict=True):
        assert "session_timeout: 5.0" in host.sh("cat /etc/link/link.yml")
        assert "autopurge.snapRetainCount=5" in host.sh("cat /etc/zookeeper/link/zoo.cfg")
        assert host.property("MainPID", "zookeeper") != server


@every_suite
def test_a_killed_agent_is_restarted_and_nothing_is_lost(converged: Site) -> None:
    holder = converged.healthy()
    with converged.watch(VIP, lost=0):
        holder.sh(f"kill -9 {holder.property('MainPID')}")
        lab.wait_until(lambda: holder.property("NRestarts") != "0", 10, "systemd restarted the agent")
        assert converged.healthy() is holder


@every_suite
def test_stopping_the_service_of_the_holder_loses_nothing(converged: Site) -> None:
    holder = converged.healthy()
    with converged.watch(VIP, lost=0):
        holder.sh("systemctl stop link")
        assert holder not in converged.bound(VIP)
        time.sleep(1)
        holder.sh("systemctl start link")
        assert converged.healthy() is not holder


@pytest.mark.parametrize("server", ["follower", "leader"])
def test_killing_the_host_of_the_holder_costs_at_most_a_third_of_a_second(converged: Site, server: str) -> None:
    holder = converged.healthy()
    victim = next(host for host in converged.hosts if host.mode() == server)
    if victim is not holder:
        assert victim.api("POST", f"/ips/{VIP}/lock", timeout=15)[0] == 204
        assert converged.healthy() is victim

    def heard() -> bool:  # only who answered can fall silent
        wires = [converged.show(host, VIP)["wire"] for host in converged.hosts if host is not victim]
        return all(wire["state"] == "answered" and wire["mac"] == victim.mac for wire in wires)

    lab.wait_until(heard, 10, f"both standbys hear {victim.name}")
    try:
        with converged.watch(VIP, away=0.35) as observer:
            time.sleep(0.5)
            print(f"{victim.name} dies at {time.monotonic()}")
            victim.die()
            time.sleep(6)
            for host in converged.hosts:
                print(host is not victim and host.sh("journalctl --no-pager -o short-precise -u link | tail -40"))
        assert observer.result.holders[0][0] == victim.name
    finally:
        victim.revive()
        converged.healthy()


def test_spread_moves_one_ip_after_the_other_until_no_host_has_two_more_than_another(converged: Site) -> None:
    vips = [VIP, *(f"10.77.0.{number}" for number in range(101, 106))]
    holder = converged.healthy()
    for vip in vips[1:]:
        converged.add(vip=f"{vip}/32")
        if converged.settled(vip)[0] is not holder:
            assert holder.api("POST", f"/ips/{vip}/lock", timeout=15)[0] == 204
    for vip in vips:
        assert converged.settled(vip)[0] is holder
    with converged.watch(*vips, lost=0, two=1) as observer:
        said = converged.play(book="spread.yml")
        for vip in vips:
            converged.settled(vip)
    assert sorted(len([vip for vip in vips if vip in host.bound()]) for host in converged.hosts) == [2, 2, 2]
    moves = re.findall(rf"\(item=(10.77.0.\d+)/32: {holder.name} -> (node\d)\)", said.text)
    assert sorted(vip for vip, _ in moves) == [vip for vip in vips if vip not in holder.bound()], said.text
    times = sorted(observer.result.of(vip).holders[-1][1] for vip, _ in moves)
    moved = [observer.result.of(vip).longest(2, 99) for vip in vips]
    assert all(b - a > max(moved) for a, b in itertools.pairwise(times)), "one ends before the next begins"
    said = converged.play(book="spread.yml")
    assert not any(said.changed.values()), said.text
    for host, vip in itertools.product(converged.hosts, vips[1:]):
        assert host.api("DELETE", f"/ips/{vip}", timeout=15)[0] == 204


def test_tls_and_a_password_can_be_set_while_it_runs_and_the_password_is_never_shown(converged: Site) -> None:
    converged.healthy()
    for host in converged.hosts:
        certificates(converged, host)
    converged.variables |= {
        "zookeeper_tls_keystore": "/etc/zookeeper/tls/server.pem",
        "zookeeper_tls_truststore": "/etc/zookeeper/tls/ca.pem",
        "link_config": {
            **converged.variables.get("link_config", {}),
            "zookeeper_tls_ca": "/etc/zookeeper/tls/ca.pem",
            "tls_cert": "/etc/link/api.pem",
            "tls_key": "/etc/link/api.pem",
        },
        "link_user": "operator",
        "link_password": PASSWORD,
    }
    with converged.watch(VIP, lost=0):  # a new ensemble address is a new session: the IP may move
        said = converged.play("--diff", "-vvv")
        time.sleep(8)  # more than a session: what the old one leaves behind would show by now
    assert not said.failed
    assert PASSWORD not in said.text and "+zookeeper: " not in said.text
    for host in converged.hosts:
        assert ":2281,10" in host.sh("grep ^zookeeper: /etc/link/link.yml")
        assert host.sh(f"python3 -c '{HEALTH_BY_TLS}' operator:wrong") == "401"
        health = host.sh(f"python3 -c '{HEALTH_BY_TLS}' operator:{PASSWORD}")
        assert json.loads(health)["zookeeper"]["state"] == "connected"
    assert len(converged.bound(VIP)) == 1


PASSWORD = "hunter2-hunter2"
HEALTH_BY_TLS = """import base64, ssl, sys, urllib.error, urllib.request as u
token = base64.b64encode(sys.argv[1].encode()).decode()
asked = u.Request("https://127.0.0.1:1313/health", headers={"Authorization": "Basic " + token})
try:
    print(u.urlopen(asked, context=ssl._create_unverified_context()).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)"""


def certificates(site: Site, host: Container) -> None:
    """An authority, and a certificate with the host's address for its ZooKeeper and its API."""
    openssl, ca = tool("openssl"), site.lab.directory / "ca"
    new = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    if not ca.with_suffix(".pem").exists():
        output_of(*new, "-subj", "/CN=lab", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    own = site.lab.directory / host.name / "own"
    names = ["-subj", f"/CN={host.name}", "-addext", f"subjectAltName=IP:{host.address},IP:127.0.0.1"]
    signed = ["-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    output_of(*new, *names, *signed, "-keyout", f"{own}.key", "-out", f"{own}.pem")
    both = own.with_suffix(".key").read_text() + own.with_suffix(".pem").read_text()
    host.sh("mkdir -p /etc/zookeeper/tls")
    for name, text, group in (
        ("etc/zookeeper/tls/ca.pem", ca.with_suffix(".pem").read_text(), "root"),
        ("etc/zookeeper/tls/server.pem", both, "zookeeper"),
        ("etc/link/api.pem", both, "link"),
    ):
        (host.root / name).write_text(text)
        host.sh(f"chown root:{group} /{name}; chmod {'644' if group == 'root' else '640'} /{name}")


def test_a_dry_run_on_converged_hosts_shows_the_difference_and_makes_none(converged: Site) -> None:
    said = converged.play("--check", "--diff", zookeeper_config={"autopurge.snapRetainCount": 7})
    # whatever has happened to them: one file of each host and nothing else
    assert said.changed == {"node1": 1, "node2": 1, "node3": 1}, said.text
    assert said.text.count("+autopurge.snapRetainCount=7") == 3
    assert not any("RetainCount=7" in host.sh("cat /etc/zookeeper/link/zoo.cfg") for host in converged.hosts)


# ------------------------------------------------------------------------------------------ arriving and leaving


def one_leaves(site: Site, holder: Container, *arguments: str, state: str = "present", **variables: Any) -> None:
    """Take the holder out while the others stay; its server of ZooKeeper stays, too."""
    others = [host for host in site.hosts if host is not holder]
    holder.state, before = state, [host.property("MainPID") for host in others]
    with site.watch(VIP, lost=0):
        said = site.play(*arguments, **variables)
        assert [host for host, count in said.changed.items() if count] == [holder.name], said.text
        assert len(site.bound(VIP)) == 1 and holder not in site.bound(VIP)
    assert [host.property("MainPID") for host in others] == before
    left = belongings(holder) - site.bare[site.hosts.index(holder)]
    assert not [line for line in left if "zookeeper" not in line]
    assert not any(site.play(*arguments, **variables).changed.values())


@every_suite
def test_removal_leaves_nothing_bound_and_nothing_behind(converged: Site) -> None:
    left = {"link_state": "absent", "zookeeper_state": "absent"}
    [first] = converged.bound(VIP)
    one_leaves(converged, first, state="absent")
    [second] = converged.bound(VIP)
    one_leaves(converged, second, "--limit", second.name, link_state="absent")
    [last] = converged.bound(VIP)
    said = converged.play("--limit", last.name, fails=True, link_state="absent")  # two more are in the inventory
    assert f"Nobody has taken {VIP}/32" in said.sentence and converged.bound(VIP) == [last], said.text
    last.sh("systemctl start link")
    for host in converged.hosts:
        host.sh("rm -rf /etc/zookeeper/tls")  # what the operator brought, he takes
    converged.play(**left)
    assert [belongings(host) for host in converged.hosts] == converged.bare
    assert not any(converged.play(**left).changed.values())


def test_hosts_with_ipv6_only_that_are_known_by_name_and_have_no_index_of_packages(converged: Site) -> None:
    wheels = converged.lab.directory / "wheels"
    requirements = load(ROLES[0] / "defaults/main.yml")["link_requirements"]
    output_of(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), *requirements)
    for host in converged.hosts:
        # no own line in the inventory but its name, so the interface is that of the default route
        host.ip(f"addr del {host.address}/24 dev {host.interface}")
        host.ip(f"-6 route replace default via {converged.lab.address6(254)} dev {host.interface}")
        host.address, host.state = host.address6, "present"
        host.sh("rm -f /etc/pip.conf; mkdir -p /srv/wheels")
        for wheel in wheels.iterdir():
            (host.root / "srv/wheels" / wheel.name).write_bytes(wheel.read_bytes())
    converged.line, converged.vip = "{0.name}", VIP6
    offline = {"link_pip_arguments": "--no-index --find-links /srv/wheels"}
    converged.variables = {"link_ips": [{"ip": f"{VIP6}/128"}], "link_source": str(converged.program), **offline}
    said = converged.play()
    assert f"{VIP6}/128: ACTIVATED" in said.sentence, said.text
    holder = converged.healthy()
    for number, host in enumerate(converged.hosts, 1):
        assert f"server.{number}=[{host.address6}]:2888:3888" in host.sh("cat /etc/zookeeper/link/zoo.cfg")
        assert "127.0.1.1" in host.sh(f"getent hosts {host.name}; cat /etc/hosts")
    with converged.watch(VIP6, lost=0):
        assert not any(converged.play().changed.values())
    assert converged.bound(VIP6) == [holder]


def test_a_dist_upgraded_python_is_taken_over_and_nothing_is_lost(converged: Site) -> None:
    holder = converged.healthy()
    pid = holder.property("MainPID")
    (holder.root / "etc/apt/sources.list.d/next.list").write_text(debian("trixie") + "\n")
    packages = "python3 python3-venv python3-apt python3-packaging python3-pip-whl python3-setuptools-whl"
    install = "DEBIAN_FRONTEND=noninteractive apt-get -qq --no-install-recommends"
    holder.sh(f"apt-get -qq -o Acquire::Languages=none update && {install} -t trixie install {packages}")
    holder.sh(f"{install} --purge autoremove")
    assert "3.11" not in holder.sh("python3 --version; ls /usr/bin")
    converged.variables.pop("link_pip_arguments")
    (holder.root / "etc/pip.conf").write_text(f"[global]\nproxy = {converged.proxy}\ncert = {CERTIFICATES}\n")
    with converged.watch(converged.vip, lost=0):
        said = converged.play()
        assert converged.healthy() is holder
    assert [host for host, count in said.changed.items() if count] == [holder.name]
    assert holder.property("MainPID") == pid and "python3.13" in holder.sh(f"readlink /proc/{pid}/exe")
    with converged.watch(converged.vip, lost=0):
        holder.sh("systemctl restart link")
        converged.healthy()
