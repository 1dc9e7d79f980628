"""Mathematics on PET volumes: deconvolution methods behind one door.

    import deconv
    nbd = deconv.method("nbd")
    result = nbd.deconvolve(volume, nbd.settings("paper"), guide=ct, device="cpu")

Methods are imported when asked for, so that `import deconv` loads neither torch nor scipy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from deconv.result import Cancelled, Deconvolution, OnStep, Progress
from deconv.volume import Volume

__all__ = ["Cancelled", "Deconvolution", "GUIDED", "METHODS", "Method", "OnStep", "PRESET_NAMES", "Progress",
           "RESUMABLE", "Volume", "method"]

#: method name -> "module" whose functions are the door, or "module:TABLE" with one door per name
METHODS: Mapping[str, str] = {
    "nbd": "deconv.nbd",
    "richardson-lucy": "deconv.classic:METHODS",
    "tv": "deconv.classic:METHODS",
    "cubic": "deconv.classic:METHODS",
    "nearest": "deconv.classic:METHODS",
}

#: method name -> its presets, known without importing it; a configuration is checked against this
PRESET_NAMES: Mapping[str, tuple[str, ...]] = {
    "nbd": ("best", "paper", "preview"),
    "richardson-lucy": ("default",),
    "tv": ("default", "quick"),
    "cubic": ("default",),
    "nearest": ("default",),
}

#: (method, preset) that look at a CT; no PET is made to wait for a CT that the others would not look at
GUIDED: frozenset[tuple[str, str]] = frozenset({("nbd", "paper")})

#: (method, preset) whose `deconvolve` takes `checkpoints` (deconv.checkpoint) and goes on where a killed run was
RESUMABLE: frozenset[tuple[str, str]] = frozenset({("nbd", "best"), ("nbd", "paper")})


class Method(Protocol):
    """The door every method has."""

    @property
    def PRESETS(self) -> Mapping[str, Any]:
        """Preset name -> frozen settings."""
        ...

    @property
    def settings(self) -> Any:
        """settings(preset, **overrides) -> frozen settings; ValueError for an unknown preset or setting."""
        ...

    @property
    def deconvolve(self) -> Any:
        """deconvolve(volume, settings, *, guide=None, device="cpu", on_step=None) -> Deconvolution."""
        ...


def method(name: str) -> Method:
    """The method called `name`, imported now.

    Raises ValueError, listing what exists, where there is no such method.

    >>> import numpy as np
    >>> pet = Volume.axial(np.arange(8.0).reshape(2, 2, 2), (4, 4, 4))
    >>> nearest = method("nearest")
    >>> result = nearest.deconvolve(pet, nearest.settings("default"))
    >>> result.image.shape, result.image.spacing.tolist(), result.image.unit
    ((4, 4, 4), [2.0, 2.0, 2.0], 'Bq/ml')
    >>> cubic = method("cubic")
    >>> abs(cubic.deconvolve(pet, cubic.settings("default")).metrics["activity_change"]) < 1e-6
    True
    >>> nearest.settings("best")
    Traceback (most recent call last):
    ValueError: nearest has no preset 'best'; it has default
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; methods are {', '.join(sorted(METHODS))}")
    module, _, table = METHODS[name].partition(":")
    found = import_module(module)
    return getattr(found, table)[name] if table else found  # type: ignore[return-value]
