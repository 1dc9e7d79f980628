"""docs/troubleshooting.md: every code that the node writes has its row, and no row is about a code that nobody writes.

The codes are read from the source: refusals, verdicts on series, states of jobs, events, security, alerts, gates.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicomnode.errors import NodeError
from dicomnode.reconcile import STAGES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROW = re.compile(r'^\| <a id="([\w-]+)"></a>`([\w-]+)` \|([^|]+)\|([^|]+)\|([^|]+)\|$', re.MULTILINE)
CODE = re.compile(r"[a-z][a-z_-]*")

#: callable -> which positional argument is a code
POSITION = {"Refused": 0, "_refused": 0, "Failing": 0, "Eligibility": 1, "_Decision": 1, "Completeness": 1,
            "_Finding": 0, "_hold": 1, "_positive": 2, "Refusal": 3, "record": 1, "_note": 1}
#: callables whose keyword `code` goes into the ledger
KEYWORD = frozenset({"event", "set_series", "set_job", "_set", "_again", "replace", "line", "_Refused"})
#: functions that return a code, alone or as the first of several values
RETURNING = frozenset({"stack_flaw", "trouble"})
#: What cannot be read from the source, and where its values come from. Codes of other codes are found where those are.
DYNAMIC = {
    "f'guide-{refusal.code}'": "any refusal, of the CT: the row guide-",
    "series_type.lower()": "dynamic, gated",
    "old['peer']": "a peer's name", "row['peer']": "a peer's name", "peer.name": "a peer's name",
    "source": "a peer's name", "trouble(text)": "memory, device, disk: what it returns is read",
    "type(error).__name__": "classes of dicomnode.errors",
}
PASSED_ON = re.compile(r"\b(code|\w+\.code|WorkerLost\.code|outcome\['code'\]|outcome\.get\('code'.*)$")
#: Arguments of the same callables that are no codes.
NO_CODES = frozenset({"spool", "event", "ledger", "error.response", "state"})


def _modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for package in ("deconv", "sop", "dicomnode")
            for path in sorted((ROOT / package).rglob("*.py"))}


MODULES = _modules()
CONSTANTS = {target.id: node.value.value for module in MODULES.values() for node in module.body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
             and isinstance(node.value.value, str) for target in node.targets if isinstance(target, ast.Name)}


def _texts(node: ast.expr) -> Iterator[str]:
    """The strings that an expression can be; `?expression` where it cannot be told."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and node.value:
            yield node.value
    elif isinstance(node, ast.Name) and node.id in CONSTANTS:
        yield CONSTANTS[node.id]
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get") and len(node.args) == 2:
        yield from _texts(node.args[1])
    else:
        yield "?" + ast.unparse(node)


def _first(node: ast.expr | None) -> Iterator[ast.expr]:
    """What is returned, or the first of several values."""
    if isinstance(node, ast.Tuple):
        yield node.elts[0]
    elif isinstance(node, ast.IfExp):
        yield from _first(node.body)
        yield from _first(node.orelse)
    elif node is not None:
        yield node


def _assigned(node: ast.AST) -> Iterator[ast.expr]:
    """What is assigned to a name `code`, alone or among others."""
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        names = [ast.unparse(part) for part in target.elts] if isinstance(target, ast.Tuple) else [ast.unparse(target)]
        if "code" not in names:
            continue
        values = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
        for value in values:
            if isinstance(value, ast.Tuple) and isinstance(target, ast.Tuple):
                yield value.elts[names.index("code")]
            elif not isinstance(target, ast.Tuple):
                yield value


def _of_call(call: ast.Call) -> Iterator[ast.expr]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "_note" and ast.unparse(call.args[0]) != "ledger":
        return  # of a peer: a state, no code
    if name in POSITION and len(call.args) > POSITION[name]:
        yield call.args[POSITION[name]]
    yield from (keyword.value for keyword in call.keywords
                if keyword.arg == "code" and (name in KEYWORD or name in POSITION))


def _found() -> tuple[set[str], set[str]]:
    """The codes of the source, and the expressions that could not be resolved."""
    codes, unknown = set(), set()
    for module in MODULES.values():
        for node in ast.walk(module):
            sites = list(_of_call(node)) if isinstance(node, ast.Call) else []
            assigned = list(_assigned(node))
            if isinstance(node, ast.FunctionDef) and node.name in RETURNING:
                sites += [value for inner in ast.walk(node) if isinstance(inner, ast.Return)
                          for value in _first(inner.value)]
            codes |= {text for site in (*sites, *assigned) for text in _texts(site) if CODE.fullmatch(text)}
            unknown |= {text[1:] for site in sites for text in _texts(site) if text.startswith("?")}
    return codes, unknown


def _alerts() -> set[str]:
    """The first part of the key of every Trouble."""
    tree = MODULES[ROOT / "dicomnode" / "troubles.py"]
    keys = [call.args[0] for call in ast.walk(tree) if isinstance(call, ast.Call)
            and ast.unparse(call.func) == "Trouble"]
    texts = [key.value if isinstance(key, ast.Constant) else key.values[0].value for key in keys]  # type: ignore
    return {f"alert-{text.removeprefix('once:').partition(':')[0]}" for text in texts}


def _gates() -> set[str]:
    tree = MODULES[ROOT / "deconv" / "safeguards.py"]
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "_gate"]
    return {f"gate-{call.args[0].value}" for call in calls if isinstance(call.args[0], ast.Constant)}


def _refusals() -> set[str]:
    """Errors that a C-STORE or another request is answered with."""
    def family(error: type[NodeError]) -> Iterator[type[NodeError]]:
        yield error
        for each in error.__subclasses__():
            yield from family(each)

    return {each.__name__ for each in family(NodeError) if each.__module__ == "dicomnode.errors"
            and (each is NodeError or each.status != NodeError.status)}


CODES, UNKNOWN = _found()
EXPECTED = (CODES - {"complete", "pet"}) | {"guide-"} | _alerts() | _gates() | _refusals()
ROWS = {anchor: (shown, *(cell.strip() for cell in cells)) for anchor, shown, *cells in ROW.findall(PAGE)}


def test_every_code_has_a_row_and_every_row_a_code():
    """Whoever meets a code finds it; what is gone from the source is gone from the page."""
    assert len(CODES) > 80 and len(_alerts()) > 10 and len(_gates()) > 10
    assert EXPECTED - set(ROWS) == set(), "not on the page"
    assert set(ROWS) - EXPECTED == set(), "on the page, and nobody writes it"


def test_no_code_is_explained_twice():
    """One anchor, one row."""
    anchors = re.findall(r'<a id="([\w-]+)">', PAGE)
    assert len(anchors) == len(set(anchors)) == len(ROWS)


def test_codes_that_are_computed_are_known():
    """A new place that writes a code which the source does not show must be thought of here."""
    assert {text for text in UNKNOWN - NO_CODES if not PASSED_ON.search(text)} == set(DYNAMIC)


@pytest.mark.parametrize("anchor", sorted(ROWS))
def test_a_row_says_what_it_means_what_to_do_and_whether_data_is_safe(anchor):
    """Short, and complete: four cells, the anchor is the code."""
    shown, means, do, data = ROWS[anchor]
    assert anchor in (shown, f"alert-{shown}", f"gate-{shown}")
    assert len(means) > 10 and len(do) > 5
    assert data.split()[0].strip(".,:;") in ("Safe", "Gone", "Not", "In", "Look"), data


def test_the_stages_of_the_reconciliation_are_named():
    """The morning report's words are explained."""
    assert all(f"`{stage}`" in PAGE for stage in STAGES)
