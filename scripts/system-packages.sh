#!/bin/sh
# Debian packages the tests talk to: DCMTK (peers), Orthanc (a real PACS), dicom3tools (dciodvfy, dcentvfy), Chromium
# (the status page as people see it); and what builds pyradiomics, the reference for the texture map: a C compiler and
# Python's headers.
# Installs what is missing, as root or by sudo; says what to do where neither is possible.
set -eu

missing=""
[ -x /usr/bin/storescu ] || missing="$missing dcmtk"
[ -x /usr/sbin/Orthanc ] || missing="$missing orthanc"
[ -x /usr/bin/dciodvfy ] || missing="$missing dicom3tools"
[ -x /usr/bin/chromium ] || missing="$missing chromium"
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
"${PYTHON:-python3}" -c 'import os, sysconfig
raise SystemExit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing="$missing python3-dev"
[ -n "$missing" ] || exit 0

command="apt-get install -y --no-install-recommends$missing"
if [ "${SKIP_SYSTEM_PACKAGES:-}" = 1 ]; then
    echo "Missing:$missing. Tests that need them will be skipped (SKIP_SYSTEM_PACKAGES=1)." >&2
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "Missing:$missing, and there is no apt-get. Remedy: install these your system's way," >&2
    echo "or run with SKIP_SYSTEM_PACKAGES=1: the tests that need them are then skipped." >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root="env DEBIAN_FRONTEND=noninteractive"
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    as_root="sudo env DEBIAN_FRONTEND=noninteractive"
else
    echo "Missing:$missing, and this user can neither be root nor use sudo. Remedy: have an administrator run" >&2
    echo "    sudo $command" >&2
    echo "or run with SKIP_SYSTEM_PACKAGES=1: the tests that need them are then skipped." >&2
    exit 1
fi
echo "Installing$missing" >&2
# shellcheck disable=SC2086 # words are meant to be split
$as_root $command >/dev/null || { $as_root apt-get update >/dev/null && $as_root $command >/dev/null; }
# Orthanc's package starts a server of its own on port 4242; the tests start theirs.
if command -v systemctl >/dev/null && systemctl is-active --quiet orthanc 2>/dev/null; then
    echo "The orthanc package has started its own service; stop it if you do not want it: systemctl disable --now orthanc" >&2
fi
