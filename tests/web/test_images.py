"""Pictures and values of the study page: the right voxels at the right place, on one scale, kept by browsers safely."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from pydicom import dcmread
from pydicom.uid import RLELossless

from deconv.volume import Volume
from dicomnode.looks import LOOKS_FILE, load
from dicomnode.web.images import planes_of, version_of
from dicomnode.web.palette import PALETTES, picture
from dicomnode.web.volumes import Gone, Pair, Shelf, open_pair, oriented
from sop.read import read_series
from sop.suv import suv_factors
from tests.web.nodes import Furnished


@pytest.fixture
def base(node: Furnished) -> str:
    return f"/studies/{node.studies['delivered']}/jobs/{node.job}"


def read(app: FastAPI, node: Furnished) -> tuple[Volume, Volume, float]:
    """Source and derived volume as the reader of series has them, and the factor to SUVbw."""
    site = app.state.site
    job = site.ledger.job(node.job)
    source, info = read_series([site.spool.absolute(row["path"]) for row in site.ledger.instances(job["series_uid"])])
    derived, _ = read_series(sorted(site.spool.absolute(job["derived_path"]).glob("*.dcm")))
    return source, derived, suv_factors(info).require()


def grey(answer) -> np.ndarray:
    """Indices into the palette, 0 to 255."""
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "image/png", answer.text
    return np.asarray(Image.open(BytesIO(answer.content)))


def test_a_value_is_that_of_the_voxel_at_the_place(app, node, client, base):
    """At known voxels of source and derived series the readout is what the reader of series gives, in SUV."""
    source, derived, factor = read(app, node)
    for index in ((7, 20, 11), (0, 0, 0), (15, 31, 31), (8, 6, 22)):
        x, y, z = source.position(index)
        found = client.get(f"{base}/value?x={x}&y={y}&z={z}").json()
        assert found["unit"] == "SUVbw"
        assert found["before"]["value"] == pytest.approx(source.array[index] * factor, rel=1e-6)
        assert found["before"]["index"] == list(index)
    for index in ((15, 12, 44), (31, 63, 0)):
        x, y, z = derived.position(index)
        found = client.get(f"{base}/value?x={x}&y={y}&z={z}").json()
        assert found["after"]["value"] == pytest.approx(derived.array[index] * factor, rel=1e-6)
        coarse = tuple(k // 2 for k in index)  # the derived voxels 2k and 2k + 1 lie in source voxel k
        assert found["before"]["value"] == pytest.approx(source.array[coarse] * factor, rel=1e-6)


def test_slices_share_the_scale_of_the_pictures_unless_another_is_asked_for(app, node, client, base):
    """A link without a scale must not show each slice at one of its own: before and after could not be compared."""
    site = app.state.site
    top = load(site.spool.absolute(f"derived/{node.job}") / LOOKS_FILE).measures["top"]
    for when in ("before", "after"):
        for number in (3, 15):
            path = f"{base}/slice/{when}/axial/{number}.png"
            assert np.array_equal(grey(client.get(path)), grey(client.get(f"{path}?top={top}")))


def test_outside_the_field_of_view_there_is_no_value(client, base):
    """Nothing is made up beyond the edge."""
    found = client.get(f"{base}/value?x=9999&y=0&z=0").json()
    assert found["before"] is None and found["after"] is None


def test_a_slice_shows_its_voxels(app, node, client, base):
    """Pixels of a slice are the volume's values over the top of the scale, from front to back and right to left."""
    source, derived, factor = read(app, node)
    after = grey(client.get(f"{base}/slice/after/axial/15.png?top=15&palette=grey")).astype(int)
    expected = np.clip(derived.array[15] * factor / 15, 0, 1) * 255
    assert np.abs(after - expected).max() <= 0.51
    before = grey(client.get(f"{base}/slice/before/axial/15.png?top=15&palette=grey")).astype(int)
    assert np.abs(before - np.clip(source.array[7] * factor / 15, 0, 1) * 255).max() <= 0.51
    coronal = grey(client.get(f"{base}/slice/after/coronal/20.png?top=15&palette=grey")).astype(int)
    assert np.abs(coronal - np.clip(derived.array[::-1, 20] * factor / 15, 0, 1) * 255).max() <= 0.51


def test_before_and_after_of_a_slice_number_lie_at_one_place(app, node):
    """The planes that the viewer is told of put voxel centres of both grids where they are, by mm."""
    pair = open_pair(app.state.site.ledger, app.state.site.spool, app.state.site.ledger.job(node.job))
    source, derived, _ = read(app, node)
    axial = next(one for one in planes_of(pair) if one["plane"] == "axial")
    corner, right, down, step = (np.array(axial[name]) for name in ("corner", "right", "down", "step"))
    for volume, number, pixel in ((derived, 9, (30, 41)), (derived, 0, (0, 0))):
        mm = corner + step * number + right * (pixel[1] + 0.5) * volume.spacing[2] + down * (
            pixel[0] + 0.5) * volume.spacing[1]
        assert mm == pytest.approx(volume.position((number, *pixel)), abs=1e-6)
    across = corner + right * 5.5 * source.spacing[2] + down * 3.5 * source.spacing[1] + step * 9
    assert source.index(across) == pytest.approx((4.25, 3, 5), abs=1e-6)  # fine slice 9 is the upper half of slice 4
    coronal = next(one for one in planes_of(pair) if one["plane"] == "coronal")
    top_left = (np.array(coronal["corner"]) + np.array(coronal["right"]) * derived.spacing[2] / 2
                + np.array(coronal["down"]) * derived.spacing[0] / 2)
    assert top_left == pytest.approx(derived.position((31, 0, 0)), abs=1e-6)  # the head is up


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
def test_any_orientation_is_turned_upright(order, signs):
    """However the array lies in the patient, the same place has the same value, and the axes go to head, back, left."""
    rng = np.random.default_rng(0)
    direction = np.eye(3)[:, ::-1][:, order] * signs
    volume = Volume(rng.random((4, 5, 6), dtype=np.float32), np.array([3.0, 2.0, 1.5]), np.array([10.0, -20.0, 30.0]),
                    direction, "Bq/ml")
    turned = oriented(volume)
    assert np.allclose(turned.direction, np.eye(3)[:, ::-1])
    for index in ((0, 0, 0), (3, 1, 5), (2, 4, 3)):
        there = tuple(np.round(turned.index(volume.position(index))).astype(int))
        assert turned.array[there] == volume.array[index]
        assert turned.position(there) == pytest.approx(volume.position(index))


def test_before_and_after_share_one_scale(app, node, client, base):
    """The same SUV has the same grey in both projections, and `top` moves both."""
    looks = load(app.state.site.spool.absolute(f"derived/{node.job}") / LOOKS_FILE)
    for when in ("before", "after"):
        shown = grey(client.get(f"{base}/mip/{when}/coronal.png?palette=grey")).astype(int)
        values = looks.arrays[f"{when}.coronal"]
        assert np.abs(shown - np.clip(values / looks.measures["top"], 0, 1) * 255).max() <= 0.51
        top = 2 * looks.measures["top"]
        half = grey(client.get(f"{base}/mip/{when}/coronal.png?palette=grey&top={top}")).astype(int)
        assert np.abs(half - np.clip(values / top, 0, 1) * 255).max() <= 0.51


def test_every_kind_of_picture_is_there(client, base):
    """Projections, the turning view, residual, uncertainty and kernel."""
    for path in ("mip/after/axial", "mip/after/sagittal", "mip/residual/coronal", "mip/uncertainty/coronal",
                 "turn/before/0", "turn/after/23", "kernel/d", "kernel/h", "kernel/w"):
        assert grey(client.get(f"{base}/{path}.png?palette=hot")).size > 20, path


def test_pictures_are_kept_by_the_version_that_the_page_names(app, node, client, base):
    """With the right version for ever and by one person's browser alone; with another it asks each time."""
    version = version_of(app.state.site.ledger.job(node.job))
    address = f"{base}/mip/after/axial.png?v={version}"
    first = client.get(f"{address}&top=10")
    assert first.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    again = client.get(f"{address}&top=10", headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and not again.content
    other = client.get(f"{address}&top=11", headers={"If-None-Match": first.headers["ETag"]})
    assert other.status_code == 200 and other.headers["ETag"] != first.headers["ETag"]
    assert client.get(f"{base}/mip/after/axial.png?v=old").headers["Cache-Control"] == "private, no-cache"


def test_a_job_computed_again_has_another_version(app, node):
    """Its pictures are not mistaken for those of before."""
    job = app.state.site.ledger.job(node.job)
    other = job | {"report": job["report"] | {"files_sha256": "0" * 64}}
    assert version_of(job) != version_of(other)


def test_what_is_purged_says_so(app, node, client, base):
    """Slices of removed files are a clear 404, also where they were just looked at; what is left is still shown."""
    site = app.state.site
    assert client.get(f"{base}/slice/after/axial/3.png").status_code == 200
    shutil.rmtree(site.spool.absolute(f"derived/{node.job}"))
    site.ledger.query("UPDATE job SET purged_at = ? WHERE id = ?", (node.now, node.job))
    assert client.get(f"{base}/slice/before/axial/3.png").status_code == 200
    gone = client.get(f"{base}/slice/after/axial/3.png")
    assert gone.status_code == 404 and "removed after delivery" in gone.text
    assert client.get(f"{base}/slice/before/axial/3.png").status_code == 200
    assert client.get(f"{base}/mip/after/axial.png").status_code == 404
    found = client.get(f"{base}/viewer", headers={"HX-Request": "true"})
    assert "removed after delivery" in found.text and "data-viewer" in found.text


def test_without_its_source_a_series_is_shown_in_the_unit_of_its_report(app, node):
    """The factor was found from all headers of the source; one derived header could lead to another. A job of a version
    that told none is asked by all of its headers."""
    site = app.state.site
    job = site.ledger.job(node.job)
    factor = open_pair(site.ledger, site.spool, job).factor
    shutil.rmtree(site.spool.absolute(f"objects/{job['study_uid']}/{job['series_uid']}"))
    told = job["report"]["looks"]
    other = job | {"report": job["report"] | {"looks": told | {"unit": "kBq/mL", "factor": 1e-3}}}
    pair = open_pair(site.ledger, site.spool, other)
    assert pair.before is None and (pair.unit, pair.factor) == ("kBq/mL", 1e-3)
    older = open_pair(site.ledger, site.spool, job | {"report": {}})
    assert (older.unit, older.factor) == ("SUVbw", pytest.approx(factor, rel=1e-9))
    assert told["factor"] == factor


def test_a_compressed_source_shows_the_same_values(app, node):
    """Sources come as the scanner or PACS sends them; RLE Lossless decodes to what it was made of."""
    site = app.state.site
    job = site.ledger.job(node.job)
    plain = open_pair(site.ledger, site.spool, job).volume("before").array.copy()
    for row in site.ledger.instances(node.series["delivered"]):
        path = site.spool.absolute(row["path"])
        image = dcmread(path)
        image.compress(RLELossless, generate_instance_uid=False)
        image.save_as(path)
    assert np.array_equal(open_pair(site.ledger, site.spool, job).volume("before").array, plain)


def test_a_damaged_source_does_not_take_the_derived_series_with_it(app, node):
    """A slice that is missing on disk is told; the other side is read."""
    site = app.state.site
    row = site.ledger.instances(node.series["delivered"])[3]
    site.spool.absolute(row["path"]).unlink()
    pair = open_pair(site.ledger, site.spool, site.ledger.job(node.job))
    assert pair.before is None and "repair" in pair.missing["before"]
    assert pair.after is not None and pair.unit == "SUVbw"
    with pytest.raises(Gone):
        pair.slice("before", "axial", 0)


@pytest.mark.parametrize("harm", ["cut", "overwritten", "empty"])
def test_a_damaged_derived_file_is_told(app, node, client, base, harm):
    """The page lives; it says what cannot be shown."""
    path = sorted(app.state.site.spool.absolute(f"derived/{node.job}").glob("*.dcm"))[4]
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:len(whole) // 2], "overwritten": b"x" * len(whole), "empty": b""}[harm])
    found = client.get(f"{base}/viewer", headers={"HX-Request": "true"})
    assert found.status_code == 200 and "After is not shown" in found.text and "data-viewer" in found.text


def test_a_full_disk_is_left_to_the_receiver(app, node, client, base, monkeypatch):
    """Looking at slices takes no room that objects might need; it says so."""
    monkeypatch.setattr("dicomnode.spool.Spool.free_bytes", lambda self: 2**20)
    found = client.get(f"{base}/viewer", headers={"HX-Request": "true"})
    assert found.status_code == 200 and "the disk is too full" in found.text


@pytest.mark.parametrize("path", ["mip/after/axial.png?top=0", "mip/after/axial.png?top=nan",
                                  "mip/after/axial.png?palette=rainbow", "mip/after/oblique.png", "value?x=1&y=2",
                                  "value?x=inf&y=0&z=0"])
def test_what_is_no_picture_is_refused(client, base, path):
    """A bad question gets 422, nothing else."""
    assert client.get(f"{base}/{path}").status_code == 422


@pytest.mark.parametrize("path", ["slice/after/axial/999.png", "slice/after/axial/-1.png", "turn/after/24.png"])
def test_a_slice_that_is_not_there_is_not_found(client, base, path):
    """So is a direction beyond the last."""
    assert client.get(f"{base}/{path}").status_code == 404


def test_a_job_of_another_study_is_not_found(client, node):
    """The study in the address is the job's."""
    assert client.get(f"/studies/{node.studies['held']}/jobs/{node.job}/mip/after/axial.png").status_code == 404


def test_nobody_sees_a_picture_without_being_known(app, base):
    """Pictures are as protected as pages."""
    stranger = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    for path in ("mip/after/axial.png", "slice/after/axial/3.png", "value?x=0&y=0&z=0"):
        assert stranger.get(f"{base}/{path}").status_code in (303, 401)


def test_the_shelf_keeps_within_its_bound_and_reads_once():
    """The least recently used goes; two who ask at once make one reading."""
    made: list[str] = []

    def make(name: str) -> Pair:
        made.append(name)
        volume = Volume(np.zeros((4, 8, 8), dtype=np.float32), np.ones(3), np.zeros(3), np.eye(3), "1")
        return Pair(volume, None, "counts", 1.0, {"after": "not built"})

    shelf = Shelf(max_bytes=2 * 4 * 8 * 8 * 4)
    threads = [threading.Thread(target=shelf.get, args=("a", 1, lambda: make("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("b", "a", "c", "a", "b"):
        shelf.get(name, 1, partial(make, name))
    assert made == ["a", "b", "c", "b"]
    shelf.get("b", 2, lambda: make("b, of other files"))
    assert made[-1] == "b, of other files"


def test_palettes_run_from_nothing_to_the_top():
    """Inverse grey begins white and ends black; what is above the top stays at the end; signed is white at zero."""
    assert PALETTES["inverse"][0].tolist() == [255, 255, 255] and PALETTES["inverse"][255].tolist() == [0, 0, 0]
    image = np.asarray(Image.open(BytesIO(picture(np.array([[-3.0, 0.0, 5.0, 99.0]]), top=10, palette="grey"))))
    assert image.tolist() == [[0, 0, 128, 255]]
    assert PALETTES["signed"][127:129].min() >= 250
    with pytest.raises(ValueError, match="above zero"):
        picture(np.ones((2, 2)), top=0.0, palette="grey")
