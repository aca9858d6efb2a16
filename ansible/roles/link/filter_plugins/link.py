"""Jinja filters of role link."""

from typing import Any


def link_moves(seen: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Moves, in their order, that spread the IPs evenly: `ip`, `of` (the host that has it), `to`.

    `seen`: what GET /ips says on each host. An IP goes only to a host that is STANDBY for it, and only if that one then
    has no more IPs than the other.
    """
    has = {host: [ip["ip"] for ip in ips if ip["status"] == "ACTIVATED"] for host, ips in sorted(seen.items())}
    fit = {host: {ip["ip"] for ip in ips if ip["status"] == "STANDBY"} for host, ips in seen.items()}
    moves = list[dict[str, str]]()
    while True:
        ways = [(len(has[a]) - len(has[b]), a, b, ip) for a in has for b in has for ip in has[a] if ip in fit[b]]
        gain, of, to, ip = max(ways, default=(0, "", "", ""))
        if gain < 2:
            return moves
        has[of].remove(ip)
        has[to].append(ip)
        fit[to].remove(ip)
        fit[of].add(ip)
        moves.append({"ip": ip, "of": of, "to": to})


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Any]:
        """By name."""
        return {"link_moves": link_moves}
