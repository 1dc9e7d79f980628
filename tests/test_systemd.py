"""Services and installation: units that systemd accepts and rates as closed, an installer that may be run again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dicomnode.ledger import Ledger

ROOT = Path(__file__).resolve().parents[1]
SYSTEMD = ROOT / "systemd"
INSTALL = ROOT / "scripts" / "install.sh"
#: systemd-analyze security: 0 is closed, 10 open. What they are rated, a little above.
RATINGS = {"dicomnode-receive.service": 1.5, "dicomnode-work.service": 1.6, "dicomnode-web.service": 1.0}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, their program put to one that exists here."""
    for path in (*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.target")):
        (tmp_path / path.name).write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", path.read_text()))
    return tmp_path


@needs_systemd
def test_systemd_accepts_units_and_target(units):
    """systemd-analyze verify has nothing to say about any of them."""
    done = subprocess.run(["systemd-analyze", "verify", *map(str, sorted(units.iterdir()))],
                          capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "dicomnode" in line]
    assert done.returncode == 0 and not said, done.stderr


@needs_systemd
@pytest.mark.parametrize("name", RATINGS)
def test_systemd_rates_the_units_as_closed(units, name):
    """The exposure level does not rise unnoticed; docs/install.md states it."""
    done = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--no-pager", str(units / name)],
                          capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    if found is None:
        pytest.skip("this systemd-analyze does not rate units offline")
    assert float(found[1]) <= RATINGS[name], done.stdout


@pytest.mark.parametrize("name", RATINGS)
def test_a_year_alone_is_provided_for(name):
    """Never given up, reloaded by SIGHUP, no core dumps, a bounded journal; the receiver outlives a lack of memory."""
    text = (SYSTEMD / name).read_text()
    for line in ("StartLimitIntervalSec=0", "ExecReload=/bin/kill -HUP $MAINPID", "LimitCORE=0",
                 "LogNamespace=dicomnode", "WatchdogSec=60", "WantedBy=dicomnode.target"):
        assert f"\n{line}\n" in text
    score = int(re.search(r"^OOMScoreAdjust=(-?\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert (score < 0) == ("receive" in name)
    assert ("OOMPolicy=continue" in text) == ("work" in name)
    assert "SystemMaxUse=" in (SYSTEMD / "journald@dicomnode.conf").read_text()


# --- the installer


class Site:
    """A root to install into, and a stand-in for pip that notes its arguments and makes the program."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls, self.pip = folder / "root", folder / "calls", folder / "pip"
        self.answer(0)

    def answer(self, code: int) -> None:
        venv = self.root / "opt" / "dicomnode"
        self.pip.write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n[ {code} = 0 ] || exit {code}\n'
                            f'printf "#!{venv}/bin/python\\n" > {venv}/bin/dicomnode\nchmod 755 {venv}/bin/dicomnode\n')
        self.pip.chmod(0o755)

    def install(self, *options: str, code: int = 0) -> str:
        done = subprocess.run(["sh", str(INSTALL), "--destdir", str(self.root), *options], capture_output=True,
                              text=True, timeout=60, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                                                          "PYTHON": sys.executable, "PIP": str(self.pip)})
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def mode(self, path: str) -> int:
        return (self.root / path).stat().st_mode & 0o777


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_installer_puts_everything_in_its_place(site):
    """Environment, configuration, directories with their modes, units, users, journal; the network is pip's alone."""
    said = site.install()
    assert "check --peers" in said
    etc = site.root / "etc"
    assert tomllib.loads((etc / "dicomnode" / "dicomnode.toml").read_text())["node"]["port"] == 11112
    assert (site.mode("etc/dicomnode"), site.mode("var/lib/dicomnode")) == (0o750, 0o700)
    assert site.mode("etc/dicomnode/dicomnode.toml") == 0o640
    for name in (*RATINGS, "dicomnode.target"):
        assert (etc / "systemd" / "system" / name).read_text() == (SYSTEMD / name).read_text()
    for name in ("sysusers.d/dicomnode.conf", "tmpfiles.d/dicomnode.conf", "systemd/journald@dicomnode.conf"):
        assert (etc / name).is_file()
    call = site.calls.read_text()
    assert "--constraint" in call and "[dask,dicomweb]" in call
    program = (site.root / "opt" / "dicomnode" / "bin" / "dicomnode").read_text()
    assert program.startswith("#!/opt/dicomnode/bin/python"), "it must name the place where it will lie"


def test_an_upgrade_keeps_what_is_the_sites_own(site):
    """Configuration, drop-ins and ledger stay; units of the old version are replaced; twice is as good as once."""
    site.install()
    configuration = site.root / "etc" / "dicomnode" / "dicomnode.toml"
    configuration.write_text('[node]\nae_title = "MINE"\n')
    drop_in = site.root / "etc" / "systemd" / "system" / "dicomnode-work.service.d" / "site.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nMemoryMax=64G\n")
    unit = site.root / "etc" / "systemd" / "system" / "dicomnode-work.service"
    unit.write_text("[Unit]\nDescription=of an old version\n")
    (site.root / "var" / "lib" / "dicomnode" / "ledger.sqlite3").write_bytes(b"ledger")
    assert "kept:" in site.install()
    assert configuration.read_text() == '[node]\nae_title = "MINE"\n' and drop_in.is_file()
    assert unit.read_text() == (SYSTEMD / unit.name).read_text()
    assert (site.root / "var" / "lib" / "dicomnode" / "ledger.sqlite3").read_bytes() == b"ledger"
    assert not (site.root / "opt" / "dicomnode.previous").exists()


def test_an_upgrade_that_fails_leaves_what_was_there(site):
    """No network, no room, a broken package: the environment of before is in place again, and it says so."""
    site.install()
    marker = site.root / "opt" / "dicomnode" / "bin" / "marker"
    marker.write_text("of before")
    site.answer(7)
    said = site.install(code=1)
    assert "in place again" in said and marker.read_text() == "of before"
    assert not (site.root / "opt" / "dicomnode.previous").exists()


def test_a_first_installation_that_fails_leaves_no_environment(site):
    """And the next attempt begins anew."""
    site.answer(7)
    assert "could not be installed" in site.install(code=1)
    assert not (site.root / "opt" / "dicomnode").exists()
    site.answer(0)
    site.install()


def test_uninstalling_keeps_data_and_configuration(site):
    """Programs and units go."""
    site.install()
    (site.root / "var" / "lib" / "dicomnode" / "ledger.sqlite3").write_bytes(b"ledger")
    assert "Kept" in site.install("--uninstall")
    left = {str(path.relative_to(site.root)) for path in site.root.rglob("*") if path.is_file()}
    assert left == {"etc/dicomnode/dicomnode.toml", "var/lib/dicomnode/ledger.sqlite3"}


def test_torch_for_this_machine_comes_from_its_own_index(site):
    """The version of the constraints, from the index that was named, before everything else."""
    site.install("--torch-index", "https://example.org/cpu")
    first = site.calls.read_text().splitlines()[0]
    assert "--index-url https://example.org/cpu torch==" in first


def test_another_prefix_is_written_into_the_units(site):
    """The program is started where it lies."""
    venv = site.root / "srv" / "node"
    site.pip.write_text(f'#!/bin/sh\nprintf "#!/bin/sh\\n" > {venv}/bin/dicomnode\nchmod 755 {venv}/bin/dicomnode\n')
    site.install("--prefix", "/srv/node")
    unit = (site.root / "etc" / "systemd" / "system" / "dicomnode-work.service").read_text()
    assert "ExecStart=/srv/node/bin/dicomnode work" in unit


def test_the_installer_refuses_what_it_does_not_know(site):
    """An option mistyped must not install something else."""
    assert "--help" in site.install("--no-such-option", code=2)
    assert "--uninstall" in site.install("--help")
    assert not site.root.exists()


# --- as root on a whole machine, of which a copy is made: mounts of its own over /etc, /opt, /usr/local, /var and /run

WHOLE = """
set -eu
mount -t tmpfs scratch "$1/scratch"
for top in etc opt var usr/local; do
    mkdir -p "$1/scratch/$top/upper" "$1/scratch/$top/work"
    mount -t overlay over -o "lowerdir=/$top,upperdir=$1/scratch/$top/upper,workdir=$1/scratch/$top/work" "/$top"
done
mount -t tmpfs run /run
mkdir -p /run/systemd/system
say() { echo "== $1" >> "$2/log"; }
again() { say "$1" "$2"; sh "$INSTALL" > "$2/said.$1" 2>&1 && echo done >> "$2/log" || echo refused >> "$2/log"; }
again first "$1"
touch "$1/active"
again upgrade "$1"
echo 'nonsense = 1' > /etc/dicomnode/dicomnode.toml
touch /opt/dicomnode/bin/of-before
again broken "$1"
test -e /opt/dicomnode/bin/of-before && echo "kept what ran" >> "$1/log"
stat -c '%U:%G %a %n' /etc/dicomnode /var/lib/dicomnode >> "$1/log"
"""


def _may_unshare() -> bool:
    try:
        return os.geteuid() == 0 and subprocess.run(
            ["unshare", "-m", "sh", "-c", "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w && "
             "mount -t overlay o -o lowerdir=/opt,upperdir=/mnt/u,workdir=/mnt/w /opt"],
            capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _may_unshare(), reason="needs root and overlay mounts")
def test_services_are_stopped_for_an_upgrade_and_started_again_whatever_becomes_of_it(tmp_path):
    """First installation: enabled, not started. Upgrade: stopped, then started. A configuration that does not fit the
    new version: what ran before runs again."""
    outside = {path: path.exists() for path in map(Path, (
        "/opt/dicomnode", "/etc/dicomnode", "/etc/sysusers.d/dicomnode.conf", "/var/lib/dicomnode"))}
    (tmp_path / "scratch").mkdir()
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "systemctl").write_text(f'#!/bin/sh\n[ "$1" != is-active ] || {{ test -e {tmp_path}/active; exit; }}\n'
                                     f'echo "$@" >> {tmp_path}/log\n')
    pip = fakes / "pip"
    here = "\\n".join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    pip.write_text("#!/bin/sh\nset -e\nbin=/opt/dicomnode/bin\n"
                   f'printf "{here}\\n" > "$(echo $bin/../lib/python*/site-packages)/here.pth"\n'
                   'printf "#!/bin/sh\\n" > $bin/dicomnode\nchmod 755 $bin/dicomnode\n')
    for path in fakes.iterdir():
        path.chmod(0o755)
    done = subprocess.run(["unshare", "-m", "sh", "-c", WHOLE, "whole", str(tmp_path)], capture_output=True, text=True,
                          timeout=120, env={"PATH": f"{fakes}:/usr/sbin:/usr/bin:/sbin:/bin", "INSTALL": str(INSTALL),
                                            "PYTHON": sys.executable, "PIP": str(pip)})
    assert done.returncode == 0, done.stderr
    all_three = "dicomnode-web.service dicomnode-work.service dicomnode-receive.service"
    stop, enable = f"stop {all_three}", f"enable --quiet {all_three} dicomnode.target"
    assert (tmp_path / "log").read_text().splitlines() == [
        "== first", stop, "daemon-reload", enable, "done",
        "== upgrade", stop, "daemon-reload", enable, f"start {all_three}", "done",
        "== broken", stop, f"start {all_three}", "refused", "kept what ran",
        "root:dicomnode 750 /etc/dicomnode", "dicomnode:dicomnode 700 /var/lib/dicomnode"]
    assert "nonsense" in (tmp_path / "said.broken").read_text()
    assert {path: path.exists() for path in outside} == outside, "this machine itself is left as it was"


# --- backup


def test_the_backup_of_the_documentation_gives_a_whole_ledger(tmp_path):
    """Taken while the ledger is open and written to; what was committed before is in the copy."""
    text = (ROOT / "docs" / "install.md").read_text()
    code = re.search(r"bin/python -c '(.*?)'", text, re.DOTALL)
    assert code is not None
    old, new = tmp_path / "ledger.sqlite3", tmp_path / "copy.sqlite3"
    with Ledger(old) as ledger:
        ledger.event("node", now=1.0, code="before")
        subprocess.run([sys.executable, "-c", code[1], str(old), str(new)], check=True, timeout=30)
        ledger.event("node", now=2.0, code="after")
    with Ledger(new) as copy:
        copy.check()
        assert [row["code"] for row in copy.events()] == ["before"]


def test_the_ratings_in_the_documentation_are_those_that_hold():
    """docs/install.md states the figures; the test above holds them."""
    text = (ROOT / "docs" / "install.md").read_text()
    found = {name: float(rating) for rating, name in re.findall(r"([0-9.]+) \((receive|work|web)\)", text)}
    assert {f"dicomnode-{name}.service" for name in found} == RATINGS.keys()
    assert all(rating <= RATINGS[f"dicomnode-{name}.service"] for name, rating in found.items())


def test_the_status_page_has_no_device_and_no_stranger():
    """It needs no GPU and no code made at run time; connections come from this machine alone unless a site says so;
    where memory is short it goes before everything else."""
    text = (SYSTEMD / "dicomnode-web.service").read_text()
    for line in ("PrivateDevices=true", "MemoryDenyWriteExecute=true", "IPAddressDeny=any", "IPAddressAllow=localhost",
                 "CapabilityBoundingSet=", "OOMScoreAdjust=700", "MemoryMax=1G"):
        assert f"\n{line}\n" in text
    assert "dicomnode-web.service" not in (SYSTEMD / "dicomnode-receive.service").read_text()
