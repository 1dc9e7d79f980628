"""docs/configuration.md: every key of every section, its default, limits and when it takes effect, held to the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from pydantic_core import PydanticUndefined

from dicomnode.config import Config, parse
from dicomnode.reload import NEEDS_RESTART

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)\.(\w+)` \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
TABLES = ("peer", "route")


class Row(NamedTuple):
    """One line of the page."""

    kind: str
    default: str
    unit: str
    effect: str
    meaning: str


def _model(section: str) -> Any:
    annotation = Config.model_fields[section].annotation
    return get_args(annotation)[0] if section in TABLES else annotation


ROWS = {(section, key): Row(*(cell.strip() for cell in cells)) for section, key, *cells in ROW.findall(PAGE)}
FIELDS = {(section, key): field for section in Config.model_fields
          for key, field in _model(section).model_fields.items()}


def _choices(annotation: Any) -> set[str]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(_choices, get_args(annotation))) if get_args(annotation) else set()


def _limits(schema: dict[str, Any]) -> set[float]:
    """The numbers that a value is held between, wherever in the schema of a key they stand."""
    found = {schema[name] for name in ("minimum", "maximum", "exclusiveMinimum") if name in schema}
    for part in schema.get("anyOf", []):
        found |= _limits(part)
    return found


def test_the_page_has_every_key_and_no_other():
    """Nothing undocumented, nothing invented, nothing twice."""
    assert set(ROWS) == set(FIELDS)
    assert len(ROW.findall(PAGE)) == len(FIELDS) > 100


@pytest.mark.parametrize("key", sorted(FIELDS), ids=".".join)
def test_a_key_is_described_as_it_is(key):
    """Default, choices, limits and when it takes effect are those of the model."""
    row, field = ROWS[key], FIELDS[key]
    default = field.get_default()
    if default is PydanticUndefined:
        assert row.default == "*required*"
    elif default is None:
        assert row.default == "unset"
    else:
        written = tomllib.loads(f"value = {row.default.strip('`')}")["value"]
        plain = str(default) if isinstance(default, Path) else default
        expected = list(plain) if isinstance(plain, tuple) else plain
        assert written == expected and isinstance(written, bool) == isinstance(expected, bool)
    named = set(re.findall(r"`([^`]+)`", row.kind))
    assert _choices(field.annotation) <= named
    schema = _model(key[0]).model_json_schema()["properties"][key[1]]
    shown = {float(number) for number in re.findall(r"\d+", row.kind)}
    assert {float(limit) for limit in _limits(schema)} <= shown, row.kind
    restart = key[0] in NEEDS_RESTART or ".".join(key) in NEEDS_RESTART
    assert row.effect == ("restart" if restart else "reload")
    assert len(row.meaning) > 10


def test_a_key_with_a_unit_in_its_name_shows_it():
    """`_s` is seconds, `_h` hours, `_mb` MiB, `_days` days, `_at` a time of day."""
    units = {"_s": "s", "_h": "h", "_mb": "MiB", "_days": "days", "_at": "HH:MM"}
    checked = 0
    for (_, key), row in ROWS.items():
        for ending, unit in units.items():
            if key.endswith(ending):
                assert row.unit == unit, key
                checked += 1
    assert checked > 25


def test_every_section_has_an_example_that_shows_every_key_and_loads():
    """What is copied from the page is a configuration; all examples together are one."""
    parts = re.split(r"^## (\w+)$", PAGE, flags=re.MULTILINE)[1:]
    blocks = {}
    for section, text in zip(parts[::2], parts[1::2], strict=True):
        block = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
        assert len(block) == 1, section
        shown = tomllib.loads(block[0])[section]
        assert set(shown[0] if section in TABLES else shown) == set(_model(section).model_fields), section
        blocks[section] = block[0]
    assert set(blocks) == set(Config.model_fields)
    config = parse("\n".join(blocks.values()))
    assert config.route[0].source == config.peer[0].name
