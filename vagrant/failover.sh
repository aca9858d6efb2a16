#!/usr/bin/env bash
# Makes a virtual IP on the machines of "vagrant up", cuts its holder's power, shows the gap, brings the holder back.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

readonly VIP=${LINK_VIP:-${LINK_SUBNET:-192.168.56}.100}
readonly API=http://127.0.0.1:1313
WORK=$(mktemp -d)
readonly WORK

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'failover.sh: %s\n' "$*" >&2
    exit 1
}

# on MACHINE COMMAND: run it there, as root. One connection by ssh, because vagrant itself takes seconds for each.
on() {
    [[ -s $WORK/$1 ]] || vagrant ssh-config "$1" >"$WORK/$1"
    ssh -n -q -o ConnectTimeout=10 -F "$WORK/$1" "$1" sudo "$2"
}

nodes() { vagrant status --machine-readable | awk -F, '$3 == "state" && $2 ~ /^node/ {print $2}' | sort -V; }

# api MACHINE METHOD PATH [BODY]: ask the agent there. With Python, because a minimal machine has no curl.
api() {
    on "$1" "python3 -c '
import sys, urllib.request as u, urllib.error as e
try:
    print(u.urlopen(u.Request(\"$API$3\", sys.argv[1].encode() or None, method=\"$2\"), timeout=20).read().decode(), end=\"\")
except e.HTTPError as error:
    sys.exit(f\"{error.code} {error.read().decode()}\")
' '${4:-}'"
}

# field NAME: of the virtual IP, from a GET /ips on stdin.
field() {
    python3 -c 'import json, sys
ips = [ip for ip in json.load(sys.stdin)["ips"] if ip["ip"] == sys.argv[1]]
print(ips[0][sys.argv[2]] if ips else "")' "$VIP/32" "$1"
}

# holder [EXCEPT]: which node has the address bound; waits for one.
holder() {
    local node _
    for _ in {1..60}; do
        for node in "${NODES[@]}"; do
            [[ $node != "${1:-}" ]] || continue
            [[ $(api "$node" GET /ips | field bound) != True ]] || { echo "$node" && return; }
        done
        sleep 1
    done
    fail "nobody has $VIP"
}

stop_asking() {
    [[ ! -s $WORK/client ]] || on client "pkill -INT -x ping" || true
    rm -rf "$WORK"
}

mapfile -t NODES < <(nodes)
((${#NODES[@]} > 1)) || fail "there are no machines: vagrant up"
trap stop_asking EXIT

say "$VIP is created on ${NODES[*]}"
for node in "${NODES[@]}"; do
    [[ -n $(api "$node" GET /ips | field id) ]] || api "$node" POST /ips "{\"ip\": \"$VIP/32\"}"
done
first=$(holder)
say "$first holds it; the client asks every 0.1 s"
on client "rm -f /tmp/answers; nohup ping -D -O -i 0.1 $VIP >/tmp/answers 2>&1 &"
sleep 5
say "$first loses its power"
# Not by vagrant halt --force: with libvirt that is a clean shutdown, in which the agent hands its addresses over.
on "$first" "sh -c '(sleep 1; echo o >/proc/sysrq-trigger) >/dev/null 2>&1 &'"
second=$(holder "$first")
sleep 5
on client "pkill -INT -x ping" || true
say "$second holds it now; what the client saw"
# The end counts as well: an address that never came back is the longest silence.
on client "cat /tmp/answers" | python3 -c 'import re, sys
lines = re.findall(r"^\[([\d.]+)\] (?:\d+ (bytes from))?", sys.stdin.read(), re.M)
times = [float(at) for at, answered in lines if answered]
gaps = [b - a for a, b in zip(times, [*times[1:], float(lines[-1][0])])]
print(f"{len(times)} answers, {len(lines) - len(times)} times none; the longest time without one: {max(gaps):.2f} s")'
say "$first is brought back"
vagrant up --no-provision "$first"
rm -f "$WORK/$first" # its port or address may be another one
for _ in {1..60}; do
    status=$(api "$first" GET /ips 2>/dev/null | field status 2>/dev/null) || status=
    [[ $status != STANDBY && $status != ACTIVATED ]] || break
    sleep 2
done
[[ -n $status ]] || fail "the agent of $first does not answer: vagrant ssh $first, then journalctl -u link"
say "$first is $status; $(holder) holds $VIP"
