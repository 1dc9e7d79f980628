"""The documentation as a site: it builds without a warning, shows every page and asks nothing of the internet."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from deconv.safeguards import ACTIVITY, SLICE_ACTIVITY
from dicomnode.config import parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIG = ROOT / "mkdocs.yml"
SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
#: tag -> attributes whose address a browser fetches by itself
FETCHED = {"script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src",),
           "video": ("src",), "object": ("data",)}
OUTSIDE = re.compile(r"^(https?:)?//", re.IGNORECASE)


class _Fetches(HTMLParser):
    """Collects what a browser fetches when it shows the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return  # told, not fetched
        self.found += [value for name in FETCHED.get(tag, ()) if (value := values.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `mkdocs build --strict` must be content."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(CONFIG), "--site-dir",
         str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


def _listed(items: list) -> list[str]:
    found = []
    for item in items:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        found += _listed(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation():
    """No document that nobody finds, no entry without a document."""
    listed = _listed(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"])
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages


def test_every_name_in_the_api_pages_exists():
    """What the reference shows can be imported, and has a docstring."""
    names = [name for page in (DOCS / "api").glob("*.md") for name in SHOWN.findall(page.read_text(encoding="utf-8"))]
    assert len(names) > 30 and len(names) == len(set(names))
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(import_module(module), attribute)
        assert found.__doc__, f"{name} has no docstring"
        public = getattr(import_module(module), "__all__", [attribute])
        assert attribute in public, f"{name} is not in the module's __all__"


def test_docstrings_are_shown_as_written():
    """Sentences stay text, columns and doctests become blocks, and nothing in a sentence is taken for markup."""
    spec = spec_from_file_location("docstrings", ROOT / "scripts" / "docstrings.py")
    assert spec is not None and spec.loader is not None
    pytest.importorskip("griffe", reason="pip install -e '.[docs]'")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = module.as_markdown("One *sentence* with `a_name`.\n\n    shape   (D, H, W).\n\n    >>> 1 + 1\n    2\n    ")
    assert shown == ("One \\*sentence\\* with `a_name`.\n\n```text\nshape   (D, H, W).\n```\n\n"
                     "```pycon\n>>> 1 + 1\n2\n```")


def test_the_tutorial_can_be_typed():
    """Its two files load, and node and PACS know each other by the same names and ports as the commands."""
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    pacs = json.loads(re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)[0])
    node = parse(re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)[0])
    peer = node.named_peer("PACS")
    assert (peer.ae_title, peer.port) == (pacs["DicomAet"], pacs["DicomPort"])
    known = pacs["DicomModalities"]["NBDNODE"]
    assert (known["AET"], known["Port"]) == (node.node.ae_title, node.node.port) and known["AllowStorageCommitment"]
    sent = re.findall(r"^storescu -aet (\w+) -aec (\w+) -r 127.0.0.1 (\d+) study/\w+$", page, flags=re.MULTILINE)
    assert set(sent) == {(node.named_peer("SCANNER").ae_title, node.node.ae_title, str(node.node.port))}
    assert f"http://127.0.0.1:{pacs['HttpPort']}/" in page


def test_the_physicists_limits_are_those_of_the_gates():
    """What the guide says is kept, is what holds a result back."""
    page = (DOCS / "physicist.md").read_text(encoding="utf-8")
    assert f"total activity (gate {100 * ACTIVITY:g} %), slice activity ({100 * SLICE_ACTIVITY:g} %)" in page


def test_the_site_fetches_nothing_from_elsewhere(site):
    """A hospital's network has no internet: no fonts, scripts, styles or pictures of other origins."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        parser = _Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found, page
        outside = [address for address in parser.found if OUTSIDE.match(address)]
        assert outside == [], f"{page.relative_to(site)}: {outside}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\(['\"]?(https?:)?//|@import\s+['\"]?(https?:)?//", text), sheet


def test_what_the_pages_fetch_is_there(site):
    """Every script, style sheet and picture lies in the site."""
    for page in site.rglob("*.html"):
        parser = _Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        for address in parser.found:
            target = address.split("#")[0].split("?")[0]
            if target.startswith("data:") or page.name == "404.html":
                continue
            assert (page.parent / target).exists(), f"{page.relative_to(site)}: {address}"


def test_the_reference_shows_docstrings_as_written(site):
    """Columns stay columns and doctests stay code."""
    text = (site / "api" / "volume.html").read_text(encoding="utf-8")
    assert "(D, H, W) float32, read-only" in text
    assert '<span class="gp">&gt;&gt;&gt; </span>' in text
    assert "<blockquote>" not in text
