"""What the documents say is so: commands, exit codes, links, units."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from dicomnode import __version__
from dicomnode.cli import app
from dicomnode.config import parse
from dicomnode.errors import Exit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_the_readme_names_every_command_and_none_besides():
    """The table of commands is the list of commands."""
    table = README[README.index("## Commands"):README.index("| exit code")]
    rows = " ".join(re.findall(r"^\|(.*?)\|", table, flags=re.MULTILINE))
    named = {code.split()[0] for code in re.findall(r"`([^`]+)`", rows)}
    assert named == set(COMMANDS)


def test_commands_in_the_documents_exist():
    """Whatever is written as a command, in a line of code or in a block, can be typed."""
    pattern = re.compile(r"(?:`|^|bin/)dicomnode ([a-z][a-z-]*)", re.MULTILINE)
    found = {(page.name, word) for page in PAGES for word in pattern.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 5
    assert {item for item in found if item[1] not in COMMANDS} == set()


def test_options_in_the_documents_exist():
    """A command that is copied from a page, with its options, is understood."""
    seen = 0
    for page in PAGES:
        for name, rest in re.findall(r"dicomnode ([a-z-]+)([^`|#\n]*)", page.read_text(encoding="utf-8")):
            options = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest)) - {"--help"}
            if name in COMMANDS and options:
                known = {option for parameter in COMMANDS[name].params
                         for option in (*parameter.opts, *parameter.secondary_opts)}
                assert options <= known, f"{page.name}: dicomnode {name}: {sorted(options - known)}"
                seen += 1
    assert seen > 20


def test_the_readme_names_every_option_of_deblur():
    """A reader of the table knows what `deblur` can be told."""
    row = next(line for line in README.splitlines() if line.startswith("| `deblur"))
    options = {option for parameter in COMMANDS["deblur"].params for option in parameter.opts
               if option.startswith("--")} - {"--json"}
    assert {option for option in options if f"`{option}`" not in row} == set()


def test_the_exit_codes_are_those_of_the_program():
    """Table and enumeration agree."""
    assert [int(code) for code in re.findall(r"^\| (\d) \|", README, flags=re.MULTILINE)] == [*map(int, Exit)]


def test_the_configuration_in_the_readme_is_valid():
    """A newcomer who copies it has a node."""
    block = next(text for text in re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL))
    config = parse(block)
    assert config.route[0].send_to == (config.peer[0].name,)


def test_links_and_pictures_are_there():
    """No page points at a file that does not exist."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_picture_of_the_demo_is_small():
    """It travels with every clone."""
    assert 20_000 < (ROOT / "docs" / "images" / "demo.png").stat().st_size < 300_000


def test_the_version_is_one():
    """setup.cfg, the package and the changelog agree."""
    assert f"version = {__version__}" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("unit", sorted((ROOT / "systemd").glob("*.service")), ids=lambda path: path.stem)
def test_systemd_accepts_the_units(unit, tmp_path):
    """systemd-analyze verify says nothing (the program's path is put to one that exists here)."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian package systemd)")
    text = unit.read_text(encoding="utf-8")
    command = re.search(r"^ExecStart=\S+/dicomnode (\w+)", text, flags=re.MULTILINE)
    assert command is not None and command[1] in COMMANDS
    for promise in ("User=dicomnode", "ProtectSystem=strict", "NoNewPrivileges=true", "PrivateTmp=true",
                    "ReadWritePaths=/var/lib/dicomnode", "Restart=on-failure", "Type=notify"):
        assert f"\n{promise}\n" in text
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert done.returncode == 0 and not said, done.stderr


@pytest.mark.parametrize("script", [".ci/run", "scripts/system-packages.sh", "scripts/install.sh"])
def test_scripts_can_be_run(script):
    """Executable, and the shell can read them."""
    path = ROOT / script
    assert path.stat().st_mode & 0o100
    shell = "bash" if "bash" in path.read_text(encoding="utf-8").splitlines()[0] else "sh"
    assert subprocess.run([shell, "-n", str(path)], timeout=20).returncode == 0


def test_what_cannot_be_installed_is_said_with_the_remedy(tmp_path):
    """No compiler and no apt-get: `make test` ends with a sentence, or goes on where the person says so."""
    for name in ("sh", "id", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    script = [shutil.which("sh") or "", str(ROOT / "scripts" / "system-packages.sh")]
    bare = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    refused = subprocess.run(script, env=bare, capture_output=True, text=True, timeout=20)
    assert refused.returncode == 1 and "gcc" in refused.stderr and "Remedy" in refused.stderr
    bare["SKIP_SYSTEM_PACKAGES"] = "1"
    skipped = subprocess.run(script, env=bare, capture_output=True, text=True, timeout=20)
    assert skipped.returncode == 0 and "skipped" in skipped.stderr
