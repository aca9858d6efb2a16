#!/usr/bin/env bash
# Makes a box for Vagrant's libvirt provider from Debian's packages alone, for machines that reach no box catalogue.
# Java and LinK's Python packages are in it already: on a software CPU they take ten minutes to install.
set -euo pipefail

readonly OUT=${1:-link-debian.box}
readonly SUITE=${SUITE:-bookworm}
readonly MIRROR=${MIRROR:-} # a URL, or a file of apt sources; else those of this machine
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly HERE
readonly DEFAULTS=$HERE/../ansible/roles/link/defaults/main.yml
readonly PACKAGES=systemd-sysv,systemd-timesyncd,dbus,udev,kmod,linux-image-cloud-amd64,initramfs-tools,ifupdown\
,isc-dhcp-client,openssh-server,sudo,python3,python3-apt,python3-venv,python3-packaging,iproute2,iputils-ping\
,procps,ca-certificates,libzookeeper-java,libslf4j-java,default-jre-headless

usage() {
    cat <<'END'
Usage: sudo vagrant/build-box.sh [FILE]
       vagrant box add --name link-debian FILE && LINK_BOX=link-debian vagrant up --provider libvirt

Needs mmdebstrap, e2fsprogs, qemu-utils and Vagrant (for its public key). Environment: SUITE, MIRROR.
END
}

fail() {
    printf 'build-box.sh: %s\n' "$*" >&2
    exit 1
}

# vagrant_key: the well-known public key, which Vagrant replaces in each machine.
vagrant_key() {
    local found
    found=$(find /usr/share/vagrant /usr/share/rubygems-integration /opt/vagrant -path '*keys/vagrant.pub' \
        -print -quit 2>/dev/null || true)
    [[ -n $found ]] || fail "Vagrant's public key was not found: is Vagrant installed?"
    grep -m1 '^ssh-rsa' "$found"
}

# before_packages ROOT: mmdebstrap calls it before it installs most packages.
before_packages() {
    # The drivers of a virtual machine by name: the initramfs then needs no look at this machine's devices.
    mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/man/man1" # the latter for Java's package
    echo MODULES=list >"$1/etc/initramfs-tools/conf.d/modules"
    printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >"$1/etc/initramfs-tools/modules"
}

# after_packages ROOT: mmdebstrap calls it at its end.
after_packages() {
    local root=$1
    echo debian >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
    echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
    printf 'auto lo\niface lo inet loopback\n\nallow-hotplug eth0\niface eth0 inet dhcp\n' >"$root/etc/network/interfaces"
    echo 'UseDNS no' >"$root/etc/ssh/sshd_config.d/vagrant.conf"
    chroot "$root" useradd --create-home --shell /bin/bash vagrant
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
    install -d -m 0700 "$root/home/vagrant/.ssh"
    vagrant_key >"$root/home/vagrant/.ssh/authorized_keys"
    chroot "$root" chown -R vagrant:vagrant /home/vagrant/.ssh
    python_packages "$root"
}

# python_packages ROOT: the virtual environment where role link looks for it, by way of this machine's pip settings.
python_packages() {
    local root=$1 pins
    mapfile -t pins < <(sed -n '/^link_requirements:/,/^[^ ]/s/^  - //p' "$DEFAULTS")
    cp /etc/ssl/certs/ca-certificates.crt "$root/tmp/ca.crt"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    chroot "$root" python3 -m venv /opt/link/venv
    # pip prefers these two to its own option
    env --unset=REQUESTS_CA_BUNDLE --unset=CURL_CA_BUNDLE \
        chroot "$root" /opt/link/venv/bin/pip install --quiet --cert /tmp/ca.crt "${pins[@]}"
    rm "$root/tmp/ca.crt"
}

# box_files DIRECTORY: what Vagrant reads beside the image.
box_files() {
    echo '{"provider": "libvirt", "format": "qcow2", "virtual_size": 6}' >"$1/metadata.json"
    cat >"$1/Vagrantfile" <<'END'
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |v|
    # no boot loader in the image
    v.kernel = File.join(__dir__, "vmlinuz")
    v.initrd = File.join(__dir__, "initrd.img")
    v.cmd_line = "root=/dev/vda ro console=ttyS0 net.ifnames=0"
  end
end
END
}

build() {
    local work root options=(--variant=minbase "--include=$PACKAGES" --quiet)
    work=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
    # shellcheck disable=SC2064 # the directory as it is named now
    trap "rm -rf --one-file-system '$work'" EXIT
    root=$work/root
    options+=("--essential-hook='$HERE/build-box.sh' --before-packages \"\$1\"")
    options+=("--customize-hook='$HERE/build-box.sh' --after-packages \"\$1\"")
    mmdebstrap "${options[@]}" "$SUITE" "$root" ${MIRROR:+"$MIRROR"}
    cp -L "$root/vmlinuz" "$root/initrd.img" "$work"
    mke2fs -q -t ext4 -d "$root" "$work/raw.img" 6G
    qemu-img convert -O qcow2 -c "$work/raw.img" "$work/box.img"
    box_files "$work"
    tar -czf "$OUT" -C "$work" metadata.json Vagrantfile box.img vmlinuz initrd.img
    printf 'build-box.sh: %s, %s\n' "$OUT" "$(du -h "$OUT" | cut -f1)"
}

case ${1:-} in
-h | --help) usage ;;
--before-packages) before_packages "$2" ;;
--after-packages) after_packages "$2" ;;
*)
    ((EUID == 0)) || fail "must run as root (a tree of Debian packages): sudo vagrant/build-box.sh $*"
    build
    ;;
esac
