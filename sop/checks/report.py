"""CheckItem, CheckReport, Limits: what was measured, against which limit, and what it means to a person."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CheckItem", "CheckReport", "Limits", "agreed", "at_most"]


@dataclass(frozen=True)
class Limits:
    """Limits of the check; each names its unit.

    position_mm            deviation of any corner or slice from where it must lie.
    quantisation           half a stored step, as a fraction of the slice maximum.
    activity               |sum derived / sum source - 1|, whole image.
    slice_activity         the same per source slice on the re-blurred image, relative to the slice's activity or to
                           `quiet_slice` of the mean slice's, whichever is more; noise is no fault of a quiet slice.
    end_slice_activity     the same in the end slices that the kernel reaches from beyond the field of view.
    slice_activity_sharp   the same without a kernel, where deblurring itself moves activity between slices; relative
                           to the slice or the more active of its neighbours.
    maximum                derived maximum / source maximum.
    shift_voxels           displacement of the content, in source voxels, at the centre and at the edges of the field.
    correlation            of the smoothed derived content with the smoothed source, at least.
    residual               norm of D(x * k) - y over the norm of y.
    outside_region         deviation of any voxel outside a stated region from the upsampled source, over its maximum.
    suv                    |SUV factor derived / source - 1|.
    """

    position_mm: float = 1e-3
    quantisation: float = 1e-4
    activity: float = 5e-3
    slice_activity: float = 2e-2
    slice_activity_sharp: float = 0.25
    quiet_slice: float = 0.5
    end_slice_activity: float = 0.1
    maximum: float = 3.0
    shift_voxels: float = 0.125
    correlation: float = 0.8
    residual: float = 0.25
    outside_region: float = 1e-4
    suv: float = 1e-6


@dataclass(frozen=True)
class CheckItem:
    """One promise: a stable `name`, whether it holds, what was measured, the limit, and a sentence for a person."""

    name: str
    ok: bool
    measured: float | str | None
    limit: float | str | None
    message: str


@dataclass(frozen=True)
class CheckReport:
    """All items, those that hold and those that do not."""

    items: tuple[CheckItem, ...]

    @property
    def ok(self) -> bool:
        """Whether every item holds; a report without items proves nothing and is not ok."""
        return bool(self.items) and all(item.ok for item in self.items)

    @property
    def failures(self) -> tuple[CheckItem, ...]:
        """The items that do not hold."""
        return tuple(item for item in self.items if not item.ok)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: {"ok": ..., "items": [{"name", "ok", "measured", "limit", "message"}, ...]}.

        A figure that is not finite, as of an attribute that is missing, becomes null.
        """
        items = [asdict(item) for item in self.items]
        for item in items:
            for key in ("measured", "limit"):
                if isinstance(item[key], float) and not math.isfinite(item[key]):
                    item[key] = None
        return {"ok": self.ok, "items": items}


def at_most(name: str, measured: float, limit: float, what: str) -> CheckItem:
    """Holds where `measured` is a number not above `limit`."""
    message = f"{what}: {measured:.6g}, limit {limit:.6g}"
    return CheckItem(name, bool(measured <= limit), float(measured), float(limit), message)


def agreed(name: str, troubles: list[str], what: str) -> CheckItem:
    """Holds where nothing was found; the first finding is told, with how many there are."""
    if not troubles:
        return CheckItem(name, True, None, None, what)
    more = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
    return CheckItem(name, False, f"{len(troubles)} found", None, f"{what}: but {troubles[0]}{more}")
