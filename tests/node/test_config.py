"""Configuration: one frozen value, every wrong key named, the shipped file complete and equal to the defaults."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from deconv import GUIDED, METHODS, PRESET_NAMES, method
from dicomnode.config import Config, Peer, Route, load, parse
from dicomnode.errors import ConfigError

SHIPPED = Path(__file__).resolve().parents[2] / "conf" / "dicomnode.toml"
PACS = '[[peer]]\nname = "PACS"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\nport = 4242\n'
ROUTE = ('[[route]]\nname = "psma"\nwhen = {{ Modality = "PT" }}\nmethod = "{method}"\npreset = "{preset}"\n'
         'send_to = ["PACS"]\n')
CONTRACT = """
[node]
ae_title = "NBDNODE"
host = "127.0.0.1"
port = 11112
data_dir = "/var/lib/dicomnode"

[completeness]
quiet_s = 30

[[peer]]                      # who may send to us and to whom we send
name = "PACS"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = 4242

[[route]]                     # first match wins
name = "psma"
when = { Modality = "PT" }    # keyword = glob; nested: "RadiopharmaceuticalInformationSequence.Radiopharmaceutical"
method = "nbd"
preset = "PRESET"
send_to = ["PACS"]
"""


def _plain(value: Any) -> Any:
    """As TOML writes it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {name: _plain(field.get_default()) for name, field in model.model_fields.items()}


def _with_examples_uncommented(text: str) -> str:
    head, examples = text.split("# [[peer]]", 1)
    lines = ("# [[peer]]" + examples).splitlines()
    shown = [line[2:] for line in lines if line.startswith("# [[") or " = " in line]
    return head + "\n".join(shown)


def test_shipped_file_has_every_key_with_its_default_and_no_other():
    """conf/dicomnode.toml, table by table."""
    written = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    tables = [name for name in Config.model_fields if name not in ("peer", "route")]
    expected = {name: _defaults(type(getattr(Config(), name))) for name in tables}
    assert written == {name: {key: value for key, value in keys.items() if value is not None}
                       for name, keys in expected.items()}
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120, line


def test_shipped_file_shows_every_key_that_is_unset_by_default():
    """As a comment in its table, with an example that loads."""
    tables = re.split(r"^\[(\w+)\]", SHIPPED.read_text(encoding="utf-8").partition("# [[peer]]")[0], flags=re.M)[1:]
    shown = dict(zip(tables[::2], tables[1::2], strict=True))
    for name in shown:
        model = type(getattr(Config(), name))
        unset = {key for key, value in _defaults(model).items() if value is None}
        examples = "\n".join(line[2:] for line in shown[name].splitlines() if re.match(r"# \w+ = ", line))
        written = tomllib.loads(examples)
        assert set(written) == unset, name
        model.model_validate(written)


@pytest.mark.parametrize(("table", "model"), [("peer", Peer), ("route", Route)])
def test_shipped_examples_show_every_key_of_peer_and_route(table: str, model: type[BaseModel]):
    """Uncommented they load, have every key, and the keys with a default show it."""
    text = _with_examples_uncommented(SHIPPED.read_text(encoding="utf-8"))
    assert getattr(parse(re.sub(r"^query = false", "query = true ", text, flags=re.M)), table)  # as `source` asks for
    written = tomllib.loads(text)[table][0]
    assert set(written) == set(model.model_fields)
    for key, default in _defaults(model).items():
        if default is not None and default is not PydanticUndefined:
            assert written[key] == default, key


def test_shipped_file_loads_as_the_defaults():
    """Installing it unchanged changes nothing."""
    assert load(SHIPPED) == Config()


def test_empty_file_is_a_complete_configuration():
    """Every key has a default."""
    assert parse("") == Config()


def test_example_of_the_contract_loads():
    """The documented keys make a whole file."""
    config = parse(CONTRACT.replace("PRESET", "preview"))
    assert config.route[0].send_to == ("PACS",)
    assert config.named_peer("PACS").port == 4242
    assert config.named_route("psma") is config.route[0]
    assert config.named_route("other") is None


def test_unknown_preset_is_refused_and_the_known_ones_are_listed():
    """A preset that this version lacks is found at load, not at night."""
    with pytest.raises(ConfigError, match=r"route 'psma': method 'nbd' has no preset 'fastest'; it has best, paper, "):
        parse(CONTRACT.replace("PRESET", "fastest"))


def test_unknown_method_is_refused_and_the_known_ones_are_listed():
    """The sentence names route and methods."""
    with pytest.raises(ConfigError, match="route 'psma': no method 'magic'; there are nbd, "):
        parse(PACS + ROUTE.format(method="magic", preset="preview"))


@pytest.mark.parametrize("name", METHODS)
def test_preset_names_equal_the_presets_of_the_method(name: str):
    """The table that the configuration is checked against is true, and each preset it names makes settings."""
    found = method(name)
    assert set(PRESET_NAMES) == set(METHODS)
    assert set(PRESET_NAMES[name]) == set(found.PRESETS)
    for preset in PRESET_NAMES[name]:
        assert parse(PACS + ROUTE.format(method=name, preset=preset)).route[0].preset == preset


def test_the_table_of_presets_that_look_at_a_ct_is_true():
    """Those and only those whose schedule has a texture term."""
    looks = {(name, preset) for name in METHODS for preset, chosen in method(name).PRESETS.items()
             if any(phase.texture for stage in getattr(chosen, "stages", ()) for phase in stage.phases)}
    assert looks == GUIDED


@pytest.mark.parametrize(("text", "sentence"), [
    ("[node]\nae_titel = 'X'\n", "node.ae_titel: unknown key"),
    ("[nodes]\n", "nodes: unknown key"),
    ("[node]\nae_title = 'SEVENTEEN_LETTERS'\n", "node.ae_title: String should have at most 16 characters"),
    ("[schedule]\nwindows = ['mon-fry 20:00-06:00']\n", "windows[0]: 'mon-fry 20:00-06:00' is not a window"),
    ("[work]\ndevice = 'gpu'\n", "work.device: 'gpu' is not auto, cpu, cuda or one GPU"),
    ("[node]\nae_title = 'A\\B'\n", "node.ae_title: "),
    ("[node]\nae_title = '  '\n", "node.ae_title: "),
    ("[node]\nport = 0\n", "node.port: "),
    ("[node]\nport = 65536\n", "node.port: "),
    ("[node]\nuid_root = '1.02'\n", "node.uid_root: must be a UID root"),
    ("[reception]\nmax_pdu = 10\n", "reception.max_pdu: "),
    ("[completeness]\nquiet_s = -1\n", "completeness.quiet_s: "),
    ("[work]\ndevice = 'tpu'\n", "work.device: "),
    ("[[peer]]\nname = 'a'\nae_title = 'A'\n", r"peer[0].host: Field required"),
    ("[[peer]]\nname = 'a'\nae_title = 'A'\nhost = 'h'\naddresses = ['300.1.1.1']\n", "peer[0].addresses: "),
    (PACS + PACS, "two [[peer]] tables are named 'PACS'"),
    (PACS + 2 * ROUTE.format(method="nbd", preset="paper"), "two [[route]] tables are named 'psma'"),
    (ROUTE.format(method="nbd", preset="paper"), "route 'psma' sends to 'PACS', and no [[peer]] has that name"),
    (PACS.replace("port = 4242\n", "") + ROUTE.format(method="nbd", preset="paper"), "and that [[peer]] has no port"),
    (PACS + ROUTE.format(method="nbd", preset="paper").replace('["PACS"]', "[]"), "must name at least one peer"),
    (PACS + ROUTE.format(method="nbd", preset="paper").replace('["PACS"]', '["PACS", "PACS"]'), "names a peer twice"),
    (PACS + ROUTE.format(method="nbd", preset="paper").replace("Modality", "Modalitee"), "Modalitee"),
    ("[node\n", "not valid TOML"),
])
def test_each_mistake_is_named_with_key_and_reason(text: str, sentence: str):
    """What is wrong, where; and the file it is in."""
    with pytest.raises(ConfigError) as caught:
        parse(text, origin="site.toml")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("site.toml")


def test_all_mistakes_are_told_at_once():
    """One round of correction is enough."""
    with pytest.raises(ConfigError) as caught:
        parse("[node]\nport = 0\nwrong = 1\n[work]\nattempts = 0\n")
    assert all(key in str(caught.value) for key in ("node.port", "node.wrong", "work.attempts"))


def test_unreadable_file_is_named(tmp_path: Path):
    """A missing file, and one that is not UTF-8."""
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"[node]\ninstitution = '\xe9'\n")
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load(tmp_path / "latin.toml")


def test_configuration_cannot_be_changed_after_loading():
    """It is one value, read once."""
    config = parse(PACS)
    with pytest.raises(ValidationError):
        config.node.port = 104  # type: ignore[misc]


@given(st.text(max_size=200))
def test_no_text_makes_anything_but_a_configuration_or_a_config_error(text: str):
    """Whatever an editor leaves behind."""
    with suppress(ConfigError):
        assert isinstance(parse(text), Config)


def test_loading_a_configuration_loads_no_heavy_library(tmp_path: Path):
    """The receiving process checks routes and presets without torch, scipy, SimpleITK or highdicom."""
    (tmp_path / "site.toml").write_text(CONTRACT.replace("PRESET", "paper"))
    code = ("import sys; from dicomnode.config import load; import dicomnode.receive; load(sys.argv[1]); "
            "print([m for m in ('torch', 'scipy', 'SimpleITK', 'highdicom', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site.toml")], capture_output=True, text=True,
                          cwd=SHIPPED.parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
