#!/usr/bin/env bash
# Installs what LinK needs, then runs it. See ./start.sh --help.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

readonly VENV=.venv
readonly INTERFACES=(eth10 eth11 eth12)
readonly ZOOKEEPER=(libzookeeper-java libslf4j-java default-jre-headless) # package zookeeper needs a Java with a screen
readonly DEMO=/run/link-demo # the demo's files, while it runs

usage() {
    cat <<'END'
Usage: sudo ./start.sh [--zookeeper]          three hosts on this machine to play with; Ctrl-C removes them
                                              (--zookeeper: with a private ZooKeeper; without, the wire decides)
       sudo ./start.sh interfaces [remove]    make (remove) eth10, eth11 and eth12 on this machine
       sudo ./start.sh test [PATH_OR_OPTION…] run the tests in these paths; without a path the whole suite
       sudo ./start.sh bench [OPTIONS]        measure; with --peers beside keepalived and ucarp
       sudo ./start.sh chaos [--minutes N] [--seed S]   random faults on real agents, and what the client sees of them
       sudo ./start.sh LINK.PY OPTIONS        run link.py itself, for example: --config link.yml, --version, --check

What is missing is installed first: Debian packages (with apt-get), and Python packages into .venv beside this script.
END
}

say() { printf 'start.sh: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# packages NAME...: install the Debian packages that are missing.
packages() {
    local package missing=()
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    mkdir -p /usr/share/man/man1 # a JRE's post-install script needs it; minimal images lack it
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get update
    quietly apt-get install -y --no-install-recommends "${missing[@]}"
}

# quietly COMMAND...: run it, and show its output only if it fails.
quietly() {
    local output
    output=$("$@" 2>&1) || fail "$* failed:"$'\n'"$output"
}

# python_packages FILE: bring the virtual environment in line with a requirements file, if one has changed.
python_packages() {
    local stamp="$VENV/.${1//\//-}.sha256"
    packages python3 python3-venv iproute2
    # none yet, or an earlier Python's, whose packages the one of today does not see
    "$VENV/bin/python" -c "import pip" 2>/dev/null || quietly /usr/bin/python3 -m venv --clear "$VENV"
    sha256sum --check --status "$stamp" 2>/dev/null && return
    say "installing the Python packages of $1"
    quietly "$VENV/bin/pip" install --disable-pip-version-check -r "$1"
    sha256sum requirements.txt "$1" >"$stamp"
}

# ------------------------------------------------------------------------------------------------------------ demo
#
# A host is a network namespace, its cable a veth pair, the LAN a bridge in a namespace of its own.

demo() {
    local number net log status until zookeeper="" seconds=infinity
    while (($#)); do
        case $1 in
        --zookeeper) zookeeper=1 ;;
        --exit-after) seconds=${2:?seconds} && shift ;;
        *) fail "demo: $1 is no option of it (see --help)" ;;
        esac
        shift
    done
    packages curl iputils-ping ${zookeeper:+"${ZOOKEEPER[@]}"}
    python_packages requirements.txt
    [[ ! -e $DEMO/pid || ! -d /proc/$(<"$DEMO/pid") ]] || fail "a demo runs already: end it first (kill $(<"$DEMO/pid"))"
    clear_demo # what a killed one has left
    net=$(free_subnet)
    trap 'exit 0' INT TERM HUP
    trap 'trap "" INT TERM HUP; say "removing the demo" || true; kill $(jobs -p) 2>/dev/null || true; clear_demo' EXIT
    mkdir -m 700 "$DEMO"
    echo $$ >"$DEMO/pid"
    make_lan "$net"
    [[ -z $zookeeper ]] || start_zookeeper "$net"
    for number in 1 2 3; do
        make_host "$number" "$net" "${zookeeper:+$net.250:2181}"
        supervise "$number" >>"$DEMO/node$number/log" 2>/dev/null &
    done
    until=$((SECONDS + 30))
    for number in 1 2 3; do
        log=$DEMO/node$number/log
        until curl -sfo /dev/null -m 1 -u link:link "http://$net.$number:1313/ips"; do
            ((SECONDS < until)) || fail "no answer from the agent of node$number:"$'\n'"$(<"$log")"
            sleep 0.1
        done
    done
    guide "$net"
    for number in 1 2 3; do follow "$number" & done
    sleep "$seconds" & # a wait can be interrupted, a sleep cannot
    wait $! || true
}

# clear_demo: kill every process of the demo's hosts, remove the hosts, the switch and the files.
clear_demo() {
    local name pids
    rm -f "$DEMO/pid" # from now on nobody is started again
    ip link del linklan 2>/dev/null || true
    for name in link1 link2 link3 linkzk linksw; do
        [[ -e /run/netns/$name ]] || continue
        mapfile -t pids < <(ip netns pids "$name")
        ((${#pids[@]} == 0)) || kill -9 "${pids[@]}" 2>/dev/null || true
        ip netns del "$name"
    done
    rm -rf "$DEMO"
}

# free_subnet: the first three bytes of a /24 that this machine does not use.
free_subnet() {
    local net routes
    for net in 10.77.0 10.78.0 172.30.77 192.168.177; do
        routes=$(ip -4 route show table all root "$net.0/24" && ip -4 route show table all match "$net.0/24")
        grep -v '^default' <<<"$routes" | grep -q . || { echo "$net" && return; }
    done
    fail "no free subnet for the demo"
}

# cable NAMESPACE INTERFACE PORT NUMBER NET: make a namespace and plug it into the switch.
cable() {
    ip netns add "$1"
    ip netns exec "$1" sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore'
    ip link add name "$3" netns linksw type veth peer name "$2" netns "$1" address "02:4c:00:00:00:$(printf %02x "$4")"
    ip -n linksw link set "$3" master br0 up
    ip -n "$1" link set lo up
    ip -n "$1" link set "$2" up
    ip -n "$1" addr add "$5.$4/24" dev "$2"
    ip -n "$1" addr add "fd77::$4/64" dev "$2" nodad
}

# make_lan NET: the switch, with this machine at its end .254.
make_lan() {
    ip netns add linksw
    ip netns exec linksw sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6'
    ip -n linksw link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
    ip -n linksw link set br0 up
    ip link add name linklan address 02:4c:00:00:00:fe type veth peer name pout netns linksw
    ip -n linksw link set pout master br0 up
    ip link set linklan up
    ip addr add "$1.254/24" dev linklan
}

start_zookeeper() {
    local directory=$DEMO/zookeeper jars=/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar
    say "starting ZooKeeper"
    cable linkzk eth0 pzk 250 "$1"
    mkdir "$directory"
    printf '%s\n' "dataDir=$directory" "clientPort=2181" "tickTime=500" "maxSessionTimeout=60000" \
        "admin.enableServer=false" "4lw.commands.whitelist=srvr" >"$directory/cfg"
    ip netns exec linkzk setsid java -Xmx96m -cp "$jars" org.apache.zookeeper.server.quorum.QuorumPeerMain \
        "$directory/cfg" >"$directory/log" 2>&1 &
    disown # nobody is told when it is killed
    for _ in {1..300}; do
        ! curl -s -m 1 "telnet://$1.250:2181" <<<srvr 2>/dev/null | grep -q ^Mode || return 0
        sleep 0.1
    done
    fail "ZooKeeper does not start:"$'\n'"$(tail "$directory/log")"
}

# make_host NUMBER NET ZOOKEEPER: a host and its agent's configuration.
make_host() {
    cable "link$1" "eth1$(($1 - 1))" "p$1" "$1" "$2"
    mkdir "$DEMO/node$1"
    printf '%s\n' "hostname: node$1" "interface: eth1$(($1 - 1))" "listen: $2.$1:1313" "user: link" "password: link" \
        "state_dir: $DEMO/node$1/state" "zookeeper: '$3'" >"$DEMO/node$1/link.yml"
}

# supervise NUMBER: run the agent, as systemd would: again a second after a crash; one that was stopped stays down.
supervise() {
    local status stopped=$DEMO/node$1/stopped
    while [[ -e $DEMO/pid && $(<"$DEMO/pid") == "$$" ]]; do
        status=0
        ip netns exec "link$1" setsid "$PWD/$VENV/bin/python" link.py --config "$DEMO/node$1/link.yml" 2>&1 || status=$?
        if ((status)); then
            echo "the agent ended with $status, next start in 1 s"
            sleep 1
        elif [[ -e $DEMO/pid ]]; then
            echo "the agent was stopped; to start it again: ${SUDO_USER:+sudo }rm $stopped"
            touch "$stopped"
            while [[ -e $stopped ]]; do sleep 0.3; done
        fi
    done
}

# follow NUMBER: print what a host logs, in its colour.
follow() {
    local colour="" plain=""
    [[ ! -t 1 ]] || { colour=$'\e['$((32 + $1))m && plain=$'\e[0m'; }
    tail --pid=$$ -n +1 -f "$DEMO/node$1/log" | sed -u "s/.*/${colour}node$1 | &${plain}/"
}

guide() {
    local sudo=${SUDO_USER:+sudo }
    cat <<END

Three hosts are up: node1 $1.1, node2 $1.2, node3 $1.3. Try, in another terminal:

  # one virtual IP on all three hosts
  for n in 1 2 3; do curl -su link:link -X POST $1.\$n:1313/ips -d '{"ip": "$1.100/32"}'; done
  curl -su link:link $1.1:1313/ips        # who has it, as this host sees it: "bound", "wire", "reason"
  ping -i 0.2 $1.100

  # move it without a lost packet: node3 takes it, then gives it to another
  curl -su link:link -X POST $1.3:1313/ips/$1.100/lock
  curl -su link:link -X POST $1.3:1313/ips/$1.100/failover

  # stop the agent of node1 (of node2: link2): if it has the IP, another takes it first. Then start it again
  ${sudo}kill \$(${sudo}ip netns pids link1)
  ${sudo}rm $DEMO/node1/stopped

  # let the agent of node1 crash: it is started again after a second, as systemd would, and nothing moves
  ${sudo}kill -9 \$(${sudo}ip netns pids link1)

  # pull the cable of node2 (of node1, node3: p1, p3), see who has the IP now, and put the cable back
  ${sudo}ip netns exec linksw ip link set p2 down
  ${sudo}ip netns exec linksw ip link set p2 up

Ctrl-C ends the demo and removes everything. The logs:

END
}

# ------------------------------------------------------------------------------------------- what else there is

interfaces() {
    local name
    case ${1:-make} in
    make) for name in "${INTERFACES[@]}"; do make_interface "$name"; done ;;
    remove) for name in "${INTERFACES[@]}"; do remove_interface "$name"; done ;;
    *) fail "interfaces $1: only \"remove\" is known" ;;
    esac
    [[ ${1:-make} == remove ]] || say "remove them with: sudo ./start.sh interfaces remove"
}

# make_interface NAME: a dummy, or where the kernel has none a veth pair with the other end NAMEp.
make_interface() {
    local kind="present already"
    if [[ ! -e /sys/class/net/$1 ]]; then
        if ip link add "$1" type dummy 2>/dev/null; then
            kind="a dummy"
            ip link set "$1" arp on
        else
            ip link add "$1" type veth peer name "$1p"
            kind="a veth pair with $1p (this kernel has no dummy driver)"
        fi
    fi
    ip link set "$1" up
    [[ ! -e /sys/class/net/$1p ]] || ip link set "$1p" up
    say "$1: $kind, up"
}

# remove_interface NAME: only a dummy or a veth, never a real card.
remove_interface() {
    [[ -e /sys/class/net/$1 ]] || return 0
    ip -d link show "$1" | grep -Eqw 'dummy|veth' || fail "$1 is neither a dummy nor a veth: left alone"
    ip link del "$1"
    say "$1: removed"
}

# run_tests PATH_OR_OPTION...: what is named, or everything: first what measures nothing, a test for each processor; then
# the rest, which waits for most of its time: two files at once.
run_tests() {
    local argument paths=() options=("$@") quick=(test_link.py tests/test_sim.py tests/test_network.py tests/test_peers.py)
    for argument in "$@"; do
        [[ $argument == -* || ! -e ${argument%%::*} ]] || paths+=("${argument%%::*}")
    done
    if ((${#paths[@]} == 0)); then
        paths=(tests/test_{real,ansible,story,alerts,hostile,chaos,keepalived}.py)
        set -- "${paths[@]}" -n 2 --dist loadfile "$@"
    else
        quick=()
    fi
    [[ ! ${paths[*]} =~ real|story|alerts|hostile|chaos|keepalived|tests/?( |$) ]] || packages curl nftables openssl "${ZOOKEEPER[@]}"
    [[ ! ${paths[*]} =~ story|tests/?( |$) ]] || packages chromium chromium-driver fonts-dejavu-core
    [[ ! ${paths[*]} =~ alerts|tests/?( |$) ]] || packages prometheus
    [[ ! ${paths[*]} =~ keepalived|tests/?( |$) ]] || packages keepalived
    # hosts in containers, the Vagrant files, the scripts
    [[ ! ${paths[*]} =~ ansible|tests/?( |$) ]] ||
        packages mmdebstrap systemd-container openssh-client openssl util-linux vagrant shellcheck
    python_packages tests/requirements.txt
    ((${#quick[@]} == 0)) || "$VENV/bin/python" -m pytest -n auto --dist worksteal "${quick[@]}" "${options[@]}" ||
        [[ $? == 5 ]] # -k NAME: none of them is in this half
    exec "$VENV/bin/python" -m pytest "$@"
}

main() {
    local command=${1:-demo}
    [[ $command != --help && $command != -h ]] || { usage && exit; }
    ((EUID == 0)) || fail "must run as root (network namespaces, addresses): sudo ./start.sh $*"
    [[ $command != --zookeeper || ${2:---} == --* ]] || command=link.py # an ensemble's address: its option, not ours
    case $command in
    demo | --zookeeper | --exit-after)
        [[ ${1:-} != demo ]] || shift
        demo "$@"
        ;;
    interfaces)
        packages iproute2
        interfaces "${@:2}"
        ;;
    test)
        run_tests "${@:2}"
        ;;
    bench)
        packages "${ZOOKEEPER[@]}"
        [[ " $* " != *" --peers "* ]] || packages keepalived ucarp
        python_packages requirements.txt
        exec "$VENV/bin/python" tests/bench.py "${@:2}"
        ;;
    chaos)
        packages zookeeper
        python_packages requirements.txt
        exec "$VENV/bin/python" tests/chaos.py "${@:2}"
        ;;
    *)
        python_packages requirements.txt
        exec "$VENV/bin/python" link.py "$@"
        ;;
    esac
}

main "$@"
