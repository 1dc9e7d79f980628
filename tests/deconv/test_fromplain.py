"""Settings survive being written as JSON; what is not a setting is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconv import nbd
from deconv.finish import plain
from deconv.fromplain import rebuilt
from deconv.stages import PAPER, REWRITES, Phase, Settings, Stage

WEIGHT = st.floats(0, 10, allow_nan=False)


@st.composite
def stages(draw: st.DrawFn) -> tuple[Stage, ...]:
    """One to three stages, the last at scale 1."""
    found = []
    count = draw(st.integers(1, 3))
    for i in range(count):
        until = sorted(draw(st.sets(st.integers(1, 9000), min_size=1, max_size=4)))
        phases = tuple(Phase(n, draw(WEIGHT), draw(WEIGHT), draw(WEIGHT), draw(WEIGHT), draw(WEIGHT)) for n in until)
        scale = 1.0 if i + 1 == count else draw(st.floats(0.3, 1.0))
        found.append(Stage(draw(st.text(min_size=1, max_size=8)), scale, draw(st.sampled_from([5, 7, 15])), phases,
                           draw(st.integers(0, 200)), tuple(draw(st.lists(st.integers(0, 5000), max_size=2)))))
    return tuple(found)


@given(st.builds(Settings, preset=st.just("paper"), stages=stages(), seed=st.integers(0, 2**63 - 1),
                 learning_rate_x=st.floats(1e-6, 1), rewrites=st.sets(st.sampled_from(REWRITES)).map(tuple),
                 precision=st.sampled_from(["float32", "bfloat16"]), max_steps=st.integers(0, 10**6)))
def test_settings_come_back_from_json(settings: Settings):
    """Every stage, phase and number of any settings, through text and back."""
    text = json.dumps(plain(settings))
    assert nbd.settings(**json.loads(text)) == settings
    assert rebuilt(Settings, json.loads(text)) == settings


@pytest.mark.parametrize("preset", sorted(nbd.PRESETS))
def test_every_preset_comes_back_from_json(preset: str):
    """Also those whose fields are tuples of three, optional, or one of a few words."""
    assert nbd.settings(**json.loads(json.dumps(plain(nbd.PRESETS[preset])))) == nbd.PRESETS[preset]


STAGE = plain(PAPER)["stages"][-1]


@pytest.mark.parametrize(("overrides", "named"), [
    ({"stages": [{**STAGE, "colour": 1}]}, r"stages\[0\] has no 'colour'; it has halve_at"),
    ({"stages": [{**STAGE, "phases": [{"until": 5, "ssmi": 1.0}]}]}, r"stages\[0\].phases\[0\] has no 'ssmi'"),
    ({"stages": [{"name": "main", "scale": 1.0, "kernel_size": 15}]}, r"stages\[0\].*missing.*phases"),
    ({"stages": [7]}, r"stages\[0\] is a Stage, got 7"),
    ({"stages": "main"}, "stages is a list"),
    ({"learning_rate_x": "fast"}, "learning_rate_x is a number, got 'fast'"),
    ({"seed": 1.5}, "seed is a whole number"),
    ({"seed": True}, "seed is a whole number"),
    ({"precision": "float16"}, "precision is one of 'float32', 'bfloat16'"),
    ({"colour": 1}, "no setting 'colour'"),
])
def test_what_is_no_setting_is_refused_by_name(overrides: dict[str, Any], named: str):
    """Where it stands, what it is, and what would do."""
    with pytest.raises(ValueError, match=named):
        nbd.settings("paper", **overrides)


def test_a_list_of_the_wrong_length_is_refused():
    """Three numbers, one for each axis."""
    with pytest.raises(ValueError, match="region_voxels is a list of 3, got 2"):
        nbd.settings("preview", region_voxels=[24, 40])


def test_numbers_of_numpy_become_plain_ones():
    """A loop over np.arange is no reason to refuse, nor for settings that JSON cannot hold."""
    found = nbd.settings("paper", seed=np.int64(3), learning_rate_x=np.float32(0.5))
    assert json.loads(json.dumps(plain(found)))["seed"] == 3 and type(found.seed) is int
    with pytest.raises(ValueError, match="seed is a whole number"):
        nbd.settings("paper", seed=np.float64(3))
