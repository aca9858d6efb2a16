#!/usr/bin/env bash
# Installs what LinK needs, then runs it. See ./start.sh --help.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

readonly VENV=.venv
readonly INTERFACES=(eth10 eth11 eth12)

usage() {
    cat <<'END'
Usage: sudo ./start.sh [--zookeeper]          three hosts on this machine to play with; Ctrl-C removes them
                                              (--zookeeper: with a private ZooKeeper; without, the wire decides)
       sudo ./start.sh interfaces [remove]    make (remove) eth10, eth11 and eth12 on this machine
       sudo ./start.sh test [PYTEST OPTIONS]  run the whole test suite
       sudo ./start.sh bench [OPTIONS]        measure
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
    local stamp="$VENV/.$1.sha256"
    packages python3 python3-venv iproute2
    [[ -x $VENV/bin/python ]] || quietly /usr/bin/python3 -m venv "$VENV"
    sha256sum --check --status "$stamp" 2>/dev/null && return
    say "installing the Python packages of $1"
    quietly "$VENV/bin/pip" install --disable-pip-version-check -r "$1"
    sha256sum requirements.txt "$1" >"$stamp"
}

demo() {
    packages curl iputils-ping
    [[ " $* " != *" --zookeeper "* ]] || packages zookeeper
    python_packages requirements.txt
    exec "$VENV/bin/python" lab.py demo "$@"
}

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
        # the last seven are for test_ansible.py: hosts in containers, the Vagrant files, the scripts
        packages zookeeper mmdebstrap systemd-container openssh-client openssl util-linux vagrant shellcheck
        python_packages requirements-dev.txt
        exec "$VENV/bin/python" -m pytest test_link.py test_sim.py test_lab.py test_ansible.py "${@:2}"
        ;;
    bench)
        packages zookeeper
        python_packages requirements.txt
        exec "$VENV/bin/python" bench.py "${@:2}"
        ;;
    *)
        python_packages requirements.txt
        exec "$VENV/bin/python" link.py "$@"
        ;;
    esac
}

main "$@"
