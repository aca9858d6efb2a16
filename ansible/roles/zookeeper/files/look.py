"""Looks at a host and changes nothing there: its number in the ensemble, and by which addresses it knows the servers.

stdin: {"myid": path, "servers": names or addresses, this host's own among them}
stdout: {"id": "" or a number, "known": the servers' addresses by name, without those that only this host can reach}
"""

import contextlib
import ipaddress
import json
import pathlib
import re
import socket
import sys

told = json.load(sys.stdin)
number, known = "", dict[str, str]()
with contextlib.suppress(OSError):  # the package's own file says in words that a number belongs here
    number = "".join(re.findall(r"^\d+$", pathlib.Path(told["myid"]).read_text().strip()))
for name in told["servers"]:
    with contextlib.suppress(OSError):
        address = str(socket.getaddrinfo(name, 2888, type=socket.SOCK_STREAM)[0][4][0])
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            known[name] = address
json.dump({"id": number, "known": known}, sys.stdout)
