"""`dicomnode evaluate`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicomnode.cli import app


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """One quick benchmark: spheres only, interpolation only."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, evaluate("--suite", "small", "--methods", "cubic,nearest", "--phantoms", "spheres", "--out", out)


def test_report_and_rows_lie_in_the_folder(run):
    """Markdown on stdout and in a file, JSON, a picture; progress goes to stderr."""
    out, result = run
    assert result.exit_code == 0, result.stderr
    assert {"rows.jsonl", "report.md", "report.json", "report.png"} <= {path.name for path in out.iterdir()}
    assert "# Phantom benchmark" in result.stdout and (out / "report.md").read_text() in result.stdout
    assert "[4/4]" in result.stderr and "[4/4]" not in result.stdout


def test_a_second_run_takes_what_is_there_and_json_is_pure(run):
    """Resumed unless --fresh is given; stdout holds JSON and nothing else."""
    out, _ = run
    result = evaluate("--suite", "small", "--methods", "cubic", "--phantoms", "spheres", "--out", out, "--json")
    data = json.loads(result.stdout)
    assert result.stderr.count("(kept)") == 2 and data["folder"] == str(out)
    assert {row["method"] for row in data["rows"]} == {"cubic"}


@pytest.mark.parametrize("wrong", [("--suite", "huge"), ("--methods", "wiener"), ("--phantoms", "cube"),
                                   ("--seeds", "one"), ("--paper-fraction", "0"), ("--clip-weights", "nowhere.pt")])
def test_a_wrong_name_is_a_usage_error_in_a_sentence(wrong, tmp_path):
    """Exit code 2, nothing written, no traceback."""
    result = evaluate(*wrong, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
