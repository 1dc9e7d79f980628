"""What people look at: made with the series, kept beside it, the same again, and never worth the series itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dicomnode import looks, pipeline
from dicomnode.looks import LOOKS_FILE
from tests.node.test_pipeline import blurred_pet, run


def test_looks_lie_beside_the_series_and_their_measures_in_the_report(tmp_path: Path) -> None:
    """Loaded again they are what the report says, in plain JSON, with every picture of the contract."""
    outcome = run(tmp_path, blurred_pet())
    loaded = looks.load(tmp_path / "out" / LOOKS_FILE)
    assert json.loads(json.dumps(outcome.report["looks"], allow_nan=False)) == loaded.measures
    planes = [f"{name}.{plane}" for name in ("before", "after", "residual")
              for plane in ("axial", "coronal", "sagittal")]
    assert {*planes, "before.rotation", "after.rotation", "kernel.d", "kernel.h", "kernel.w"} <= set(loaded.arrays)
    assert all(array.dtype == np.float32 for array in loaded.arrays.values())
    assert loaded.measures["unit"] == "SUVbw"


def test_a_failure_is_said_and_leaves_the_series_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The derived objects are the same bytes; the report and the log name the problem; no half file is left."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "without").mkdir()
    run(tmp_path / "whole", blurred_pet())

    def fail(path: Path, made: looks.Looks) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pipeline, "save_looks", fail)
    outcome = run(tmp_path / "without", blurred_pet())
    assert outcome.report["looks"] == {"problem": "no pictures: OSError: disk full"}
    assert "disk full" in capsys.readouterr().err
    left, whole = (sorted((tmp_path / name / "out").iterdir()) for name in ("without", "whole"))
    assert [path.name for path in left] == [path.name for path in whole if path.name != LOOKS_FILE]
    assert all((tmp_path / "whole" / "out" / path.name).read_bytes() == path.read_bytes() for path in left)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """A repeat after a crash writes the same file."""
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, blurred_pet())
        written.append((tmp_path / name / "out" / LOOKS_FILE).read_bytes())
    assert written[0] == written[1]


def test_a_job_built_without_looks_has_none(tmp_path: Path) -> None:
    """Pages ask by loading."""
    with pytest.raises(FileNotFoundError):
        looks.load(tmp_path / LOOKS_FILE)
