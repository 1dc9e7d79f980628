"""Imports point down only, and what must start quickly or stay small never loads the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "pydicom", "pynetdicom", "scipy", "matplotlib", "numba")

# What a file must never import, anywhere in it: file or folder -> forbidden modules.
FORBIDDEN = {
    "deconv": ("pydicom", "pynetdicom", "sop", "dicomnode"),
    "sop": ("torch", "pynetdicom", "dicomnode"),
    "deconv/volume.py": ("torch", "scipy"),
    # what decides and what keeps: below everything else of the node
    **dict.fromkeys(("dicomnode/errors.py", "dicomnode/states.py", "dicomnode/spool.py", "dicomnode/ledger.py"),
                    ("torch", "pydicom", "pynetdicom", "deconv", "sop", "dicomnode.cli", "dicomnode.pipeline",
                     "dicomnode.scp", "dicomnode.scu", "dicomnode.matcher", "dicomnode.executor", "dicomnode.config")),
    **dict.fromkeys(("dicomnode/matching.py", "dicomnode/eligibility.py", "dicomnode/completeness.py",
                     "dicomnode/ctchoice.py", "dicomnode/arrival.py", "dicomnode/headers.py", "dicomnode/routing.py"),
                    ("torch", "pynetdicom", "dicomnode.ledger", "dicomnode.spool", "dicomnode.config", "time",
                     "socket")),
    "dicomnode/psflibrary.py": ("torch", "pynetdicom", "dicomnode.cli", "dicomnode.pipeline", "dicomnode.matcher",
                                "dicomnode.executor", "dicomnode.config"),
    "dicomnode/views.py": ("torch", "pydicom", "pynetdicom", "deconv", "sop"),
    "dicomnode/tonight.py": ("torch", "pydicom", "pynetdicom", "deconv", "sop", "dicomnode.web"),
    "dicomnode/operate.py": ("torch", "pydicom", "pynetdicom", "deconv", "sop"),
    **dict.fromkeys(("dicomnode/measures.py", "dicomnode/tally.py"),
                    ("torch", "pydicom", "pynetdicom", "deconv", "sop", "prometheus_client", "dicomnode.web")),
    "dicomnode/scp.py": ("torch", "deconv", "dicomnode.pipeline", "dicomnode.matcher", "dicomnode.executor"),
    "dicomnode/services": ("torch", "deconv", "dicomnode.pipeline", "dicomnode.matcher", "dicomnode.executor"),
    "dicomnode/services/findscp.py": ("torch", "pynetdicom", "dicomnode.ledger", "dicomnode.spool", "dicomnode.config",
                                      "time", "socket"),
    "dicomnode/receive.py": ("torch", "deconv", "dicomnode.pipeline", "dicomnode.matcher", "dicomnode.executor"),
    "dicomnode/scu.py": ("torch", "deconv", "sop", "dicomnode.ledger", "dicomnode.pipeline"),
    "dicomnode/query.py": ("torch", "deconv", "sop", "dicomnode.ledger", "dicomnode.pipeline"),
    "dicomnode/wanted.py": ("torch", "pynetdicom", "dicomnode.ledger", "dicomnode.config", "time", "socket"),
    # what runs beside strangers' jobs on a cluster, and what speaks with it, knows voxels and nothing of DICOM
    **dict.fromkeys(("dicomnode/remote.py", "dicomnode/daskclient.py"),
                    ("pydicom", "pynetdicom", "sop", "dicomnode.ledger", "dicomnode.spool", "dicomnode.config")),
    "dicomnode/reporting": ("torch", "pynetdicom", "deconv", "sop", "dicomnode.web", "dicomnode.pipeline",
                            "dicomnode.matcher", "dicomnode.executor", "dicomnode.cli"),
    # what pages show is loaded by them, and made from voxels alone
    **dict.fromkeys(("deconv/projections.py", "deconv/profiles.py"), ("torch", "scipy", "deconv.result")),
    **dict.fromkeys(("dicomnode/looks.py", "dicomnode/qcpictures.py", "dicomnode/wording.py"),
                    ("torch", "pydicom", "pynetdicom", "dicomnode.ledger", "dicomnode.spool", "dicomnode.config",
                     "dicomnode.pipeline")),
    "dicomnode/web": ("torch", "pynetdicom", "dicomnode.cli", "dicomnode.pipeline", "dicomnode.matcher",
                      "dicomnode.executor"),
    "dicomnode/pipeline.py": ("pynetdicom", "dicomnode.ledger", "dicomnode.config", "dicomnode.cli"),
    "dicomnode/companions.py": ("torch", "pynetdicom", "dicomnode.ledger", "dicomnode.config", "dicomnode.pipeline",
                                "dicomnode.executor", "dicomnode.delivery"),
}
NOBODY_IMPORTS = "dicomnode.cli"  # but __main__ and itself


def files(name: str) -> list[Path]:
    path = ROOT / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at any depth of its code; what only type checkers read is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {inner for node in ast.walk(tree) if isinstance(node, ast.If) and _is_type_checking(node.test)
                   for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def below(module: str, top: str) -> bool:
    return module == top or module.startswith(top + ".")


@pytest.mark.parametrize("name", FORBIDDEN)
def test_imports_point_down(name):
    """No file of this part imports what lies above it or what it must not know."""
    wrong = [f"{path.relative_to(ROOT)} imports {module}" for path in files(name) for module in imports(path)
             for top in FORBIDDEN[name] if below(module, top)]
    assert files(name) and not wrong, "\n".join(wrong)


def test_sop_knows_only_the_volume_of_deconv():
    """DICOM objects are written from volumes; no method is known there."""
    wrong = [f"{path.name} imports {module}" for path in files("sop") for module in imports(path)
             if below(module, "deconv") and not below(module, "deconv.volume")]
    assert not wrong


def test_nobody_imports_the_command_line():
    """It is a door: nothing lies behind it that others need."""
    wrong = [f"{path.relative_to(ROOT)}" for package in ("deconv", "sop", "dicomnode") for path in files(package)
             if "cli" not in path.parts and path.name != "__main__.py"
             for module in imports(path) if below(module, NOBODY_IMPORTS)]
    assert not wrong


def test_the_command_line_holds_no_logic():
    """Its files import the node's parts inside functions, so that --help stays quick."""
    tops = [node for path in files("dicomnode/cli") for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in tops}
    own = {module for module in modules if below(module, "dicomnode")}
    assert own <= {"dicomnode", "dicomnode.errors", *(module for module in own if below(module, "dicomnode.cli"))}
    assert not {module.split(".")[0] for module in modules} & set(HEAVY)


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter holds after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"],
        cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_receiving_process_never_loads_torch():
    """Its memory stays small and a GPU fault cannot reach it."""
    assert not loaded_by("import dicomnode.receive, dicomnode.serve") & {"torch", "numba", "matplotlib", "scipy"}


def test_help_loads_nothing_heavy():
    """`dicomnode --help` answers at once."""
    code = ("import sys; sys.argv = ['dicomnode', '--help']\nfrom dicomnode.__main__ import main\n"
            "try: main()\nexcept SystemExit as end: assert end.code == 0")
    assert loaded_by(code) == set()


def test_looks_are_loaded_without_what_makes_them():
    """A page that shows a picture needs numpy alone."""
    assert loaded_by("import dicomnode.looks, deconv.projections, deconv.profiles") == set()


def test_deconv_is_light_until_a_method_is_asked_for():
    """`import deconv` and the value that travels need numpy alone."""
    assert loaded_by("import deconv, deconv.volume, deconv.result") == set()


def test_what_tells_of_companions_is_light():
    """The receiver lists them in queries: highdicom, and what draws pictures, load where companions are made."""
    assert loaded_by("import dicomnode.companions") == set()
