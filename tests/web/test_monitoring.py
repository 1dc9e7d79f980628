"""conf/prometheus and conf/grafana: every expression speaks of figures that /metrics has; promtool finds no fault."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dicomnode import workers
from dicomnode.measures import gpus
from tests.web.nodes import NOW
from tests.web.test_metrics import NVIDIA, scrape, site_of

CONF = Path(__file__).resolve().parents[2] / "conf"
RULES = yaml.safe_load((CONF / "prometheus" / "dicomnode.rules.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
BOARD = json.loads((CONF / "grafana" / "dicomnode.json").read_text(encoding="utf-8"))
GIVEN = {"job", "instance"}  # labels that Prometheus adds
NAME = re.compile(r"\b(dicomnode_\w+|process_\w+)(\{[^}]*\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


@pytest.fixture(scope="module")
def exposition(furnished_once, tmp_path_factory):
    """The text of a node that has something of everything: GPU, worker, source, certificate, refusals."""
    data = tmp_path_factory.mktemp("monitored") / "data"
    shutil.copytree(furnished_once.folder / "data", data)
    site = site_of(data)
    workers.enter(site.ledger, "host:1:cuda:0", device="cuda:0", now=NOW)
    site.ledger.event("security", now=NOW, code="calling-ae", reason="unknown")
    site.ledger.query("UPDATE delivery SET state = 'waiting', attempts = 1 WHERE peer = 'PACS'")
    site.ledger.query("UPDATE job SET device = 'cuda:0' WHERE state = 'running'")
    with (data / "work.lock").open("w") as work, (data / "receiver.lock").open("w") as receiver:
        for lock in (work, receiver):
            fcntl.flock(lock, fcntl.LOCK_EX)
        text = scrape(site, ask_gpus=lambda: gpus(lambda: NVIDIA))
    site.ledger.close()
    return text


@pytest.fixture(scope="module")
def labels_of(exposition):
    """Name of a sample -> label -> its values."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def panels():
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def targets():
    return [(panel["title"], target["expr"], target["legendFormat"]) for panel in panels()
            for target in panel["targets"]]


def complaints(expression, labels_of):
    """What an expression names that is not there."""
    if re.fullmatch(r'up\{job="dicomnode"\} == 0', expression.strip()):
        return []
    known: set[str] = set(GIVEN)
    wrong = []
    for name, selector in NAME.findall(expression):
        if name.startswith("process_"):
            continue
        if name not in labels_of:
            wrong.append(f"no figure {name}")
            continue
        labels = labels_of[name]
        known |= labels.keys()
        for label, operator, text in MATCHER.findall(selector):
            if label not in labels.keys() | GIVEN:
                wrong.append(f"{name} has no label {label}")
            elif label not in GIVEN:
                wrong += [f"{name}: no {label} {one}" for one in text.split("|") if one not in labels[label]]
                assert operator in ("=", "=~", "!~")
    for group in GROUPING.findall(expression):
        wrong += [f"no label {label}" for label in re.findall(r"\w+", group) if label not in known]
    return wrong if known != GIVEN or "dicomnode_" in expression or "process_" in expression else ["names nothing"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alert_rules_speak_of_what_is_there(rule, labels_of):
    """Figures, labels and their values; each rule says what is wrong, what to do and how bad it is."""
    assert not complaints(rule["expr"], labels_of)
    assert rule["alert"].startswith("Dicomnode") and rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"] and len(rule["annotations"]["remedy"]) > 15
    known = GIVEN.union(*(labels_of.get(name, {}) for name, _ in NAME.findall(rule["expr"])))
    used = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
    assert set(used) <= known


@pytest.mark.parametrize(("title", "expression", "legend"), targets())
def test_the_dashboard_speaks_of_what_is_there(title, expression, legend, labels_of):
    """No panel stays empty because of a name."""
    assert not complaints(expression, labels_of), title
    known = GIVEN.union(*(labels_of.get(name, {}) for name, _ in NAME.findall(expression)))
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known


def test_every_figure_has_its_place_in_the_dashboard(exposition):
    """What nobody looks at need not be told."""
    shown = " ".join(expression for _, expression, _ in targets())
    families = [family.name for family in text_string_to_metric_families(exposition)]
    assert [name for name in families if name not in shown] == []


def test_the_dashboard_is_whole():
    """Its rows, one data source that the reader chooses, panels that do not lie on each other."""
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == [
        "Now", "Queue", "Durations", "Reception", "Delivery", "Machine"]
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells = [(x, y) for panel in BOARD["panels"] for place in [panel["gridPos"]]
             for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23


def promtool(*arguments, text=""):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True, timeout=60)


def test_promtool_accepts_rules_and_configuration():
    """The rules, and the part of prometheus.yml that asks the node."""
    for done in (promtool("check", "rules", str(CONF / "prometheus" / "dicomnode.rules.yml")),
                 promtool("check", "config", "--syntax-only", str(CONF / "prometheus" / "scrape.example.yml"))):
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_figures(exposition):
    """Its linter: names, units, types, texts."""
    done = promtool("check", "metrics", text=exposition)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["rules.minutes.test.yml", "rules.days.test.yml"])
def test_rules_fire_when_they_should(name):
    """promtool plays time series to them: no sooner, no later, and with these words."""
    done = promtool("test", "rules", str(Path(__file__).with_name(name)))
    assert done.returncode == 0, done.stdout + done.stderr
