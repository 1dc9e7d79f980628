"""Pictures for quality control: all of what was measured, at one scale, on the page, and the same every time."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import deconv
from dicomnode import looks, qcpictures
from dicomnode.looks import Looks
from dicomnode.qcpictures import QcPicture
from sop.read import read_series
from tests.factories import pet_series

HEADING = "Study 1.2.826.0.1.3680043.10.999.1 · tv, preset quick"
LONG = "Study " + "1.2.826.0.1.3680043.10.999. " * 20


@dataclass(frozen=True)
class Drawn:
    """Looks, the pictures made of them, and what was written and shown for that: (panel, options of imshow)."""

    looks: Looks
    pictures: list[QcPicture]
    written: list[str]
    shown: list[tuple[Axes, dict[str, Any]]]


def made(shape: tuple[int, int, int], *, method: str, uncertain: bool = False) -> Looks:
    slices, rows, columns = shape
    volume, info = read_series(pet_series(slices=slices, rows=rows, columns=columns))
    door = deconv.method(method)
    result = door.deconvolve(volume, door.settings("quick" if method == "tv" else "default"), guide=None, device="cpu")
    if uncertain:
        result = replace(result, uncertainty=result.image.with_array(result.image.array * np.float32(0.1)))
    return looks.make(volume, result, info)


def drawn(found: Looks, heading: str) -> Drawn:
    written: list[str] = []
    shown: list[tuple[Axes, dict[str, Any]]] = []
    write, imshow = Figure.text, Axes.imshow

    def text(self: Figure, x: float, y: float, s: str, *rest: Any, **options: Any) -> Any:
        written.append(s)
        return write(self, x, y, s, *rest, **options)

    def show(self: Axes, picture: Any, **options: Any) -> Any:
        shown.append((self, options))
        return imshow(self, picture, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "text", text)
        patch.setattr(Axes, "imshow", show)
        return Drawn(found, qcpictures.draw(found, heading), written, shown)


@pytest.fixture(scope="module")
def flat() -> Drawn:
    """A field that is shorter from head to foot than across, with a kernel and an uncertainty."""
    return drawn(made((10, 18, 16), method="tv", uncertain=True), HEADING)


@pytest.fixture(scope="module")
def tall() -> Drawn:
    """A whole body's shape, by a method without a kernel, under a heading that is far too long."""
    return drawn(made((48, 14, 12), method="nearest"), LONG)


def test_there_are_four_pictures_of_one_width(flat: Drawn) -> None:
    """MIPs, kernel, regions, residual: RGB, 1400 pixels wide, and PNG files of the same pixels."""
    assert [picture.name for picture in flat.pictures] == ["mips", "kernel", "regions", "residual"]
    for picture in flat.pictures:
        assert picture.rgb.dtype == np.uint8 and picture.rgb.shape[1:] == (1400, 3)
        assert 500 < picture.rgb.shape[0] < 2000
        opened = Image.open(io.BytesIO(picture.png()))
        assert opened.format == "PNG" and np.array_equal(np.asarray(opened.convert("RGB")), picture.rgb)


def test_what_a_series_does_not_have_is_not_drawn(tall: Drawn) -> None:
    """No kernel: no picture of one. No region: none of those."""
    assert [picture.name for picture in tall.pictures] == ["mips", "regions", "residual"]
    empty = Looks({**tall.looks.measures, "regions": [], "profiles": []}, tall.looks.arrays)
    assert [picture.name for picture in qcpictures.draw(empty, HEADING)] == ["mips", "residual"]


def test_the_words_below_are_left_out_where_the_site_wants_none(tall: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture says that it is for research, or none does."""
    assert tall.written.count(qcpictures.FOOTER) == len(tall.pictures)
    written: list[str] = []
    write = Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **more: written.append(s) or write(self, x, y, s, **more))
    qcpictures.draw(tall.looks, HEADING, footer="")
    assert HEADING in written and qcpictures.FOOTER not in written


@pytest.mark.parametrize("which", ["flat", "tall"])
def test_before_and_after_share_one_scale(which: str, request: pytest.FixtureRequest) -> None:
    """Every MIP is drawn from 0 to the top of the grey scale; every panel of a picture has the same mm per pixel."""
    page: Drawn = request.getfixturevalue(which)
    mips = page.shown[:4]
    assert {(options["vmin"], options["vmax"]) for _, options in mips} == {(0, page.looks.measures["top"])}
    per_mm = []
    for panel, _ in mips:
        place, across, down = panel.get_window_extent(), panel.get_xlim(), panel.get_ylim()
        per_mm += [place.width / abs(across[1] - across[0]), place.height / abs(down[1] - down[0])]
    assert per_mm == pytest.approx([per_mm[0]] * 8, rel=1e-6)


def test_every_page_bears_heading_and_footer(flat: Drawn) -> None:
    """What it is of, and that it is for research."""
    assert flat.written.count(HEADING) == len(flat.pictures)
    assert flat.written.count("Research use, not for diagnosis") == len(flat.pictures)
    assert all(page.title in flat.written for page in flat.pictures)


def test_the_table_tells_the_measures(flat: Drawn) -> None:
    """Volume, and maximum before and after with its change, as they stand in the report."""
    region = flat.looks.measures["regions"][0]
    before, after = region["before"]["max"], region["after"]["max"]
    assert f"{region['volume_ml']:.2f}" in flat.written
    assert any(text.endswith(f"({100 * (after / before - 1):+.1f} %)") and "→" in text for text in flat.written)


@pytest.mark.parametrize("which", ["flat", "tall"])
def test_nothing_runs_off_the_page(which: str, request: pytest.FixtureRequest) -> None:
    """The outermost pixels of every page are white, also under a heading that is far too long."""
    page: Drawn = request.getfixturevalue(which)
    for picture in page.pictures:
        for edge in (picture.rgb[:6], picture.rgb[-6:], picture.rgb[:, :6], picture.rgb[:, -6:]):
            assert (edge == 255).all(), picture.name


def test_the_same_looks_give_the_same_bytes(tall: Drawn) -> None:
    """So that a Secondary Capture made again is the same object."""
    again = qcpictures.draw(tall.looks, LONG)
    assert [picture.png() for picture in again] == [picture.png() for picture in tall.pictures]
