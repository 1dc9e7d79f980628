#!/bin/sh
# Installs dicomnode on Debian or Ubuntu as system services, or brings an installation to this version.
#
#   sudo sh scripts/install.sh                   (or: sudo make install)
#   sudo sh scripts/install.sh --uninstall       programs and units go; configuration, ledger and objects stay
#
#   --prefix DIR       where the virtual environment lies        [/opt/dicomnode]
#   --torch-index URL  pip index with the build of torch for this machine's GPU (pytorch.org names it)
#   --destdir DIR      install below DIR and leave this machine alone: for packages and for trying
#
# What is there is kept: the configuration, its drop-ins, the ledger. Services are stopped first and started again only
# where they ran. Before an upgrade the old environment is put aside, and put back where the new one cannot be made.
# The ledger is brought to the new version at the first start, which keeps a copy of the old one beside it.
set -eu
umask 022  # the node's user must be able to read what root installs

prefix=/opt/dicomnode
destdir=
torch_index=
uninstall=no
while [ $# -gt 0 ]; do
    case "$1" in
        --prefix) prefix=${2:?--prefix needs a directory}; shift ;;
        --torch-index) torch_index=${2:?--torch-index needs a URL}; shift ;;
        --destdir) destdir=${2:?--destdir needs a directory}; shift ;;
        --uninstall) uninstall=yes ;;
        -h | --help) sed -n '2,/^set -eu/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "install.sh: unknown option $1; --help lists them" >&2; exit 2 ;;
    esac
    shift
done

source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
venv=$destdir$prefix
etc=$destdir/etc/dicomnode
data=$destdir/var/lib/dicomnode
units=$destdir/etc/systemd/system
doc=$destdir/usr/local/share/doc/dicomnode
services="dicomnode-web.service dicomnode-work.service dicomnode-receive.service"
# The installer of packages in the new environment; a test gives its own.
pip=${PIP:-"$venv/bin/python -m pip --disable-pip-version-check"}

say() { printf '%s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
on_this_machine() { [ -z "$destdir" ]; }
with_systemd() { on_this_machine && [ -d /run/systemd/system ]; }

running() {
    with_systemd || return 0
    for unit in $services; do
        if systemctl is-active --quiet "$unit"; then printf '%s ' "$unit"; fi
    done
}

stop() {
    with_systemd || return 0
    # shellcheck disable=SC2086 # words are meant to be split
    systemctl stop $services 2>/dev/null || true
}

require() {
    if on_this_machine && [ "$(id -u)" != 0 ]; then
        fail "must be root. Remedy: sudo $0, or --destdir DIR to look at what would be installed."
    fi
    [ -f "$source/setup.cfg" ] || fail "$source holds no dicomnode. Remedy: run it from the source tree."
}

require_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is older than 3.11. Remedy: PYTHON=python3.12 $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments. Remedy: apt-get install python3-venv"
}

# --- the parts

install_user() {
    install -D -m 644 "$source/systemd/dicomnode.sysusers" "$destdir/etc/sysusers.d/dicomnode.conf"
    install -D -m 644 "$source/systemd/dicomnode.tmpfiles" "$destdir/etc/tmpfiles.d/dicomnode.conf"
    on_this_machine || return 0
    if ! getent passwd dicomnode >/dev/null; then
        if command -v systemd-sysusers >/dev/null; then
            systemd-sysusers dicomnode.conf
        else
            useradd --system --user-group --home-dir /var/lib/dicomnode --shell /usr/sbin/nologin dicomnode
        fi
    fi
}

install_directories() {
    install -d -m 755 "$destdir/etc" "$destdir/var/lib"
    install -d -m 750 "$etc"
    install -d -m 700 "$data"
    if on_this_machine; then
        chown root:dicomnode "$etc"
        chown dicomnode:dicomnode "$data"
    fi
}

install_configuration() {
    # The example shows every key of this version; the site's own file is never touched.
    install -D -m 644 "$source/conf/dicomnode.toml" "$doc/dicomnode.toml"
    if [ -e "$etc/dicomnode.toml" ]; then
        say "kept: $etc/dicomnode.toml (keys that are new in this version: $doc/dicomnode.toml)"
    else
        install -m 640 "$source/conf/dicomnode.toml" "$etc/dicomnode.toml"
        if on_this_machine; then chown root:dicomnode "$etc/dicomnode.toml"; fi
    fi
    for page in install operating; do
        install -D -m 644 "$source/docs/$page.md" "$doc/$page.md"
    done
}

install_units() {
    for unit in dicomnode-receive.service dicomnode-work.service dicomnode-web.service dicomnode.target; do
        install -d -m 755 "$units"
        sed "s#/opt/dicomnode/#$prefix/#" "$source/systemd/$unit" > "$units/$unit.new"
        chmod 644 "$units/$unit.new"
        mv "$units/$unit.new" "$units/$unit"
    done
    install -D -m 644 "$source/systemd/journald@dicomnode.conf" "$destdir/etc/systemd/journald@dicomnode.conf"
    if on_this_machine && [ -x /usr/bin/nvidia-modprobe ]; then
        install -D -m 644 "$source/systemd/nvidia.conf" "$units/dicomnode-work.service.d/nvidia.conf"
    fi
    with_systemd || return 0
    systemctl daemon-reload
    # shellcheck disable=SC2086 # words are meant to be split
    systemctl enable --quiet $services dicomnode.target
}

# pip builds in the tree that it is given: a copy, so that no file of root's is left in the checkout.
install_packages() {
    copy=$(mktemp -d)
    (cd "$source" && tar -cf - --exclude='*/__pycache__' deconv dicomnode sop setup.cfg pyproject.toml README.md) |
        tar -xf - -C "$copy"
    if [ -n "$torch_index" ]; then
        torch=$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$source/constraints.txt")
        $pip install --quiet --index-url "$torch_index" "$torch" || return 1
    fi
    $pip install --quiet --upgrade --constraint "$source/constraints.txt" "$copy[dask,dicomweb]" || return 1
    rm -rf "$copy"
    [ -x "$venv/bin/dicomnode" ]
}

install_environment() {
    rm -rf "$venv.previous"
    if [ -d "$venv" ]; then
        cp -a --reflink=auto "$venv" "$venv.previous"
    else
        install -d -m 755 "$(dirname "$venv")"
        "$python" -m venv ${PIP:+--without-pip} "$venv" || { rm -rf "$venv"; fail "$venv could not be made"; }
    fi
    if ! install_packages; then
        rm -rf "$copy"
        put_back "$1" "the packages could not be installed, see what pip says above"
    fi
    if [ -n "$1" ] && ! usable; then
        put_back "$1" "the configuration does not fit this version. Remedy: mend $etc/dicomnode.toml, then run this again"
    fi
    rm -rf "$venv.previous"
    if ! on_this_machine; then
        # The programs must name the place where they will lie.
        grep -rlI "$venv" "$venv/bin" "$venv/pyvenv.cfg" | while read -r file; do
            sed -i "s#$venv#$prefix#g" "$file"
        done
    fi
}

# What ran before runs again; ends this program.
put_back() {
    rm -rf "$venv"
    if [ -d "$venv.previous" ]; then
        mv "$venv.previous" "$venv"
        restart "$1"
        say "The earlier version is in place again." >&2
    fi
    fail "$2."
}

restart() {
    [ -n "$1" ] || return 0
    # shellcheck disable=SC2086 # words are meant to be split
    systemctl start $1
    say "started again: $1"
}

usable() {
    "$venv/bin/python" -c 'import sys
from pathlib import Path
from dicomnode.config import load
try:
    load(Path(sys.argv[1]))
except Exception as error:
    sys.exit(str(error))' "$etc/dicomnode.toml"
}

remove() {
    stop
    if with_systemd; then
        # shellcheck disable=SC2086 # words are meant to be split
        systemctl disable --quiet $services dicomnode.target 2>/dev/null || true
    fi
    rm -f "$units/dicomnode-receive.service" "$units/dicomnode-work.service" "$units/dicomnode-web.service" \
        "$units/dicomnode.target" \
        "$units/dicomnode-work.service.d/nvidia.conf" "$destdir/etc/systemd/journald@dicomnode.conf" \
        "$destdir/etc/sysusers.d/dicomnode.conf" "$destdir/etc/tmpfiles.d/dicomnode.conf"
    rm -rf "$venv" "$venv.previous" "$doc"
    if with_systemd; then systemctl daemon-reload; fi
    say "Removed. Kept: $etc, $data (patient data), the user dicomnode and its journal."
}

# --- the whole

require
if [ "$uninstall" = yes ]; then
    remove
    exit 0
fi
require_python
were_running=$(running)
stop
install_user
install_directories
install_environment "$were_running"
install_configuration
install_units
if [ -n "$were_running" ]; then
    restart "$were_running"
    exit 0
fi
say "Installed into $venv. Next:"
say "  edit $etc/dicomnode.toml"
say "  sudo -u dicomnode $prefix/bin/dicomnode check --peers"
say "  sudo systemctl start dicomnode.target"
say "  journalctl --namespace=dicomnode -f"
