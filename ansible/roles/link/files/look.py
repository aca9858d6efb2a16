"""Looks at a host on which nothing is installed yet, and changes nothing there.

stdin: {"program": link.py, "config": the mapping of link.yml, "servers": of ZooKeeper, which must answer}
stdout: {"wrong": sentences, "own": the host's own addresses, "virtual": those of the IPs, as the kernel writes them}
"""

import contextlib
import ipaddress
import json
import pathlib
import socket
import subprocess
import sys
import tempfile

# In place of the packages that link.py --check looks for; the configuration is JSON, which is YAML.
YAML = "import json\nSafeLoader, YAMLError = object, ValueError\ndef load(text, _):\n    return json.loads(text)\n"
MODULES = {"yaml": YAML, "kazoo/client": "", "scapy/layers/l2": "", "scapy/layers/inet6": ""}


def check(program: str, config: str) -> list[str]:
    """What `link.py --check` says against it; its warnings count, too: what they tell of keeps an IP from working."""
    with tempfile.TemporaryDirectory() as name:
        where = pathlib.Path(name)
        for module, text in {**MODULES, "link": program}.items():
            (where / module).parent.mkdir(parents=True, exist_ok=True)
            (where / module).with_suffix(".py").write_text(text)
        (where / "link.yml").write_text(config)
        command = [sys.executable, "-B", f"{name}/link.py", "--check", "--config", f"{name}/link.yml"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stderr.replace(f"{name}/", "").replace("link.py: ", "").splitlines()
    return [line.removeprefix("warning: ") for line in said] or ["it ends without a word"] * bool(done.returncode)


def unheard(servers: list[str]) -> list[str]:
    """Those of ZooKeeper's servers that take no connection."""
    silent = []
    for server in servers:
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 2).close()
        except (OSError, ValueError):
            silent.append(server)
    return silent


def main() -> None:
    """Print what was seen."""
    told = json.load(sys.stdin)
    wrong, virtual = check(told["program"], json.dumps(told["config"])), []
    for each in told["config"].get("ips", []):
        with contextlib.suppress(ValueError, LookupError, TypeError):  # link.py has said so
            virtual.append(str(ipaddress.ip_interface(each["ip"]).ip))
    links = json.loads(subprocess.check_output(["ip", "-json", "address"]))
    found = [address for link in links for address in link.get("addr_info", [])]
    # LinK binds an IP as /32 or /128 and without a route
    own = [a["local"] for a in found if "local" in a and not (a["local"] in virtual and a.get("noprefixroute"))]
    if not (state := told["config"].get("state_dir", "/var/lib/link")).startswith("/var/lib/"):
        wrong.append(f"state_dir: {state} is not below /var/lib, and the unit lets the agent write nowhere else")
    servers = told["servers"]
    if (silent := unheard(servers)) and 2 * len(silent) >= len(servers):
        remedy = "Start them, open their client port to this host, or correct link_zookeeper (without it one is made)"
        few = f"{len(servers) - len(silent)} of the {len(servers)} ZooKeeper servers in link_zookeeper"
        wrong.append(f"reaches {few}, not {', '.join(silent)}, and needs more than half. {remedy}")
    json.dump({"wrong": wrong, "own": own, "virtual": virtual}, sys.stdout)


main()
