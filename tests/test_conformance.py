"""docs/dicom-conformance.md says what the software negotiates and answers: nothing undocumented, nothing invented."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.presentation import PresentationContext

from dicomnode import __version__, commitment, delivery, errors, keeping, proof, query, scp, scu, stow
from dicomnode.companions import MODALITIES
from dicomnode.config import Config, Peer, parse
from dicomnode.errors import NodeError, PeerUnreachable
from dicomnode.ledger import Ledger
from dicomnode.requesting import LARGEST_PDU
from dicomnode.services import commitscp, desk, findscp, moving
from dicomnode.spool import Spool
from dicomnode.tls import TLS12_SUITES
from sop import codes as our_codes
from sop.companion import KINDS
from sop.kernel import kernel_object
from sop.mapping import mapping_object
from sop.picture import picture_objects
from sop.report import report_object
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from tests.peers import ReceiverProcess
from tests.sop.companion_origin import kernel, origin, read, told
from tests.sop.derived_series import derive, read_back, source_series

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "dicom-conformance.md").read_text(encoding="utf-8")
UID_IN_TEXT = re.compile(r"`(\d+(?:\.\d+){4,})`")
CREATED = {"1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.30",
           "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.67"}
NODE = """
[node]
ae_title = "NBDNODE"
[[peer]]
name = "PACS"
ae_title = "PACS"
host = "127.0.0.1"
port = 4242
may_query = true
query = true
confirm = "commitment"
"""


# --- reading the page


def _part(title: str, within: str = PAGE) -> str:
    """From a heading to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", within, flags=re.MULTILINE)
    assert found is not None, title
    rest = within[found.end():]
    end = re.search(rf"^#{{2,{len(found[1])}}} ", rest, flags=re.MULTILINE)
    return rest[:end.start()] if end else rest


def _table(header: str, within: str = PAGE) -> list[list[str]]:
    """The rows below the header row that begins so, cells stripped."""
    start = within.index(f"| {header} |")
    rows = []
    for line in within[start:].splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _statuses(header: str, within: str = PAGE) -> list[int]:
    return [int(row[0].strip("`"), 16) for row in _table(header, within)]


def _contexts(title: str, within: str = PAGE) -> dict[str, set[str]]:
    """SOP Class UID -> transfer syntax UIDs of the table of presentation contexts of an activity."""
    found = {}
    for name, uid, syntaxes, _ in _table("SOP class | UID | transfer syntaxes", _part(title, within)):
        assert UID(uid.strip("`")).name == name
        found[uid.strip("`")] = set(UID_IN_TEXT.findall(syntaxes))
    return found


def _negotiated(contexts: list[PresentationContext]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for context in contexts:
        found.setdefault(str(context.abstract_syntax), set()).update(map(str, context.transfer_syntax))
    return found


RECEIVE, SEND, QUERY = (_part(f"4.2.{number} {name} AE")
                        for number, name in ((2, "RECEIVE"), (3, "SEND"), (4, "QUERY")))


def test_the_statement_is_of_this_version():
    """Whoever reads it knows of which software it speaks."""
    assert f"Product: dicomnode {__version__}." in PAGE


# --- the acceptor


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse(NODE.replace("[[peer]]", f'data_dir = "{tmp_path}"\n[[peer]]'))


@pytest.fixture
def contexts(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PresentationContext]:
    """What the receiver accepts, by SOP class, caught where it is given to the port."""
    caught: list[list[PresentationContext]] = []

    class Server:
        def __init__(self, ae: Any, address: Any, title: str, contexts: list[PresentationContext], **_: Any) -> None:
            caught.append(contexts)

        def serve_forever(self) -> None: ...
        def shutdown(self) -> None: ...
        def associations(self) -> list[Any]:
            return []

    monkeypatch.setattr(scp, "Server", Server)
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        receiver = scp.Receiver(config, Spool(tmp_path), ledger, clock=lambda: 0.0)
        receiver.start()
        receiver.stop()
    assert len(caught[0]) == len({context.abstract_syntax for context in caught[0]})
    return {str(context.abstract_syntax): context for context in caught[0]}


def test_every_storage_class_is_in_the_annex_and_no_other():
    """By UID and by name."""
    rows = _table("SOP class | UID", _part("Annex A: storage SOP classes"))
    assert [row[1].strip("`") for row in rows] == list(scp.STORAGE_CLASSES)
    for name, uid, kind in rows:
        known = scp.PRIVATE_STORAGE_CLASSES.get(uid.strip("`"))
        assert name == (known or UID(uid.strip("`")).name)
        assert kind == ("private" if known else "retired" if UID(uid.strip("`")).is_retired else "")


def test_the_transfer_syntaxes_are_those_accepted_in_their_order():
    """Order, names and UIDs."""
    rows = _table("order | transfer syntax", RECEIVE)
    assert [row[2].strip("`") for row in rows] == list(map(str, scp.TRANSFER_SYNTAXES))
    assert [row[1] for row in rows] == [syntax.name for syntax in scp.TRANSFER_SYNTAXES]
    assert [int(row[0]) for row in rows] == [*range(1, len(rows) + 1)]


def test_what_the_receiver_accepts_is_what_the_page_says(contexts):
    """Every abstract syntax with its transfer syntaxes and roles."""
    services = (_contexts("Activity: verification", RECEIVE) | _contexts("Activity: query and retrieve", RECEIVE)
                | _contexts("Activity: storage commitment, asked for by a peer", RECEIVE))
    storage = {uid: set(map(str, scp.TRANSFER_SYNTAXES)) for uid in scp.STORAGE_CLASSES}
    assert _negotiated([*contexts.values()]) == services | storage
    both = {uid for uid, context in contexts.items() if context.scu_role and context.scp_role}
    assert both == {*scp.STORAGE_CLASSES, "1.2.840.10008.1.20.1"}  # C-GET; storage commitment


def test_a_real_association_is_negotiated_as_written(tmp_path):
    """Implementation, PDU, the first of our order, roles, and nothing beyond the page."""
    shared = _part("4.2.1 What all AEs share")
    assert str(IMPLEMENTATION_CLASS_UID) in shared and f"`{IMPLEMENTATION_VERSION_NAME}`" in shared
    ae = AE("SCANNER")
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.128", [str(scp.TRANSFER_SYNTAXES[5]), ExplicitVRLittleEndian])
    ae.add_requested_context("1.2.840.10008.5.1.4.31")  # Modality Worklist: not offered
    with ReceiverProcess(tmp_path) as receiver:
        assoc = ae.associate("127.0.0.1", receiver.port, ae_title="NBDNODE")
        assert assoc.is_established
        acceptor = assoc.acceptor
        assoc.release()
    assert str(acceptor.implementation_class_uid) == str(IMPLEMENTATION_CLASS_UID)
    assert acceptor.implementation_version_name == IMPLEMENTATION_VERSION_NAME
    assert f"{acceptor.maximum_length} bytes, `reception.max_pdu`" in shared
    assert [context.transfer_syntax[0] for context in assoc.accepted_contexts] == [ExplicitVRLittleEndian]
    assert [context.result for context in assoc.rejected_contexts] == [3]


def test_the_rejections_are_those_of_the_gate():
    """Result, source, reason and code of every refusal that the source holds."""
    tree = ast.parse((ROOT / "dicomnode" / "gate.py").read_text(encoding="utf-8"))
    sent = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Refusal":
            *numbers, code = call.args[:4]
            names = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
            sent |= {(*(ast.literal_eval(number) for number in numbers), ast.literal_eval(name)) for name in names}
    written = {(*(int(cell.split()[0]) for cell in row[:3]), code) for row in _table("result | source | reason")
               for code in re.findall(r"`(\w+)`", row[4])}
    assert written == sent


# --- status codes


def _family(error: type[NodeError]) -> Iterator[type[NodeError]]:
    yield error
    for each in error.__subclasses__():
        yield from _family(each)


ANY_REQUEST = {0x0110, desk.NotOffered.status, errors.NotAllowed.status}
RETRIEVAL = {0x0000, desk.PENDING, moving.CANCELLED, moving.COMPLETE_WITH_FAILURES, desk.CANNOT_COUNT,
             moving.UNABLE_TO_PERFORM, findscp.BadQuery.status, errors.CannotUnderstand.status, *ANY_REQUEST}
ANSWERS = {
    "C-STORE answers": {scp.SUCCESS, keeping.CONFLICT, *(error.status for error in (
        errors.DiskFull, errors.TooLarge, errors.DataSetMismatch, errors.CannotUnderstand, errors.NodeError,
        errors.NotAllowed))},
    "C-ECHO answers": {scp.SUCCESS},
    "C-FIND answers": {desk.MATCH, desk.PENDING, desk.PENDING_SOME_KEYS_IGNORED, moving.CANCELLED,
                       desk.TOO_MANY_MATCHES, desk.TooMuch.status, findscp.BadQuery.status,
                       errors.CannotUnderstand.status, *ANY_REQUEST},
    "C-MOVE answers": {*RETRIEVAL, desk.UNKNOWN_DESTINATION},
    "C-GET answers": RETRIEVAL,
    "N-ACTION answers": {desk.MATCH, commitscp.BadRequest.status, desk.NoSuchAction.status, *ANY_REQUEST},
    "N-EVENT-REPORT answers": {commitment.SUCCESS, commitment.NO_SUCH_EVENT_TYPE, commitment.INVALID_ARGUMENT,
                               0x0110, desk.NotOffered.status},
    "N-EVENT-REPORT sent, FailureReason": {commitscp.NO_SUCH_OBJECT, commitscp.CLASS_CONFLICT,
                                           commitscp.PROCESSING_FAILURE},
}


@pytest.mark.parametrize("header", ANSWERS)
def test_the_status_codes_that_a_service_can_answer(header):
    """Each once, none besides."""
    written = _statuses(f"{header} | meaning")
    assert len(written) == len(set(written))
    assert set(written) == ANSWERS[header]


def test_every_status_in_the_source_is_in_a_table():
    """A new error or constant with a status must find its place on the page."""
    documented = set().union(*ANSWERS.values())
    assert {error.status for error in _family(NodeError)} <= documented
    files = [ROOT / "dicomnode" / f"{name}.py" for name in ("scp", "keeping", "errors", "gate")]
    files += sorted((ROOT / "dicomnode" / "services").glob("*.py"))
    found = {int(text, 16) for path in files for text in
             re.findall(r"\b0x([0-9A-F]{4})\b", re.sub(r'"""|#.*', "", path.read_text(encoding="utf-8")))}
    command_fields = {0x0001}  # C-STORE-RQ
    assert found - command_fields <= documented, [f"0x{value:04X}" for value in sorted(found - documented)]


def test_failure_reasons_that_a_peer_may_give():
    """What is done about each is as the code does."""
    rows = _table("FailureReason received", RECEIVE)
    assert {int(row[0].strip("`"), 16) for row in rows} == set(commitment.REASONS)
    asked_again = {int(row[0].strip("`"), 16) for row in rows if row[2] != "sent again"}
    assert asked_again == {commitment.DUPLICATE_TRANSACTION}


def test_what_is_made_of_the_answers_of_a_peer_to_c_store():
    """Stored, refused or tried again: every status has one row, and the code agrees with it."""
    text = {row[1].partition(",")[0]: row[0] for row in _table("C-STORE status received", SEND)[1:3]}

    def documented(status: int) -> str:
        rows = [("stored", "`0x0000`"), ("stored", text["stored"]), ("failed", text["failed"]),
                ("refused", _table("C-STORE status received", SEND)[3][0].partition(" but")[0])]
        for name, cell in rows:
            for part in cell.split(", "):
                ends = [int(end, 16) for end in re.findall(r"0x([0-9A-F]{4})", part)]
                if ends and ends[0] <= status <= ends[-1]:
                    return name
        return "failed"

    for status in (*range(0x0000, 0x0400), *range(0xA000, 0xD000, 7), 0xA7FF, 0xA9FF, 0xBFFF, 0xCFFF, 0xFE00):
        verdict = delivery.judge([status], expected=1)
        assert documented(status) == ("stored" if verdict.delivered else "refused" if verdict.refused else "failed"), (
            f"0x{status:04X}")


# --- the requestors


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be proposed: every association that is opened, caught before it is."""
    caught: list[dict[str, Any]] = []

    def catch(peer: Peer, contexts: list[PresentationContext], *, ext_neg: Any = (), max_pdu: int = scu.MAX_PDU,
              **_: Any) -> Any:
        caught.append({"contexts": _negotiated(contexts), "count": len(contexts), "max_pdu": max_pdu,
                       "scp": {str(item.sop_class_uid) for item in ext_neg if item.scp_role}})
        raise PeerUnreachable("caught")

    for module in (scu, query):
        monkeypatch.setattr(module, "open_association", catch)
    return caught


def _proposed(opened: list[dict[str, Any]], work: Callable[[], Any]) -> dict[str, Any]:
    with pytest.raises(PeerUnreachable, match="caught"):
        work()
    return opened.pop()


TIMES = query.Times("NBDNODE")


def test_what_is_proposed_for_verification(opened, config):
    """C-ECHO."""
    proposed = _proposed(opened, lambda: scu.echo(config.peer[0], calling_ae="NBDNODE", connect_timeout_s=1,
                                                  dimse_timeout_s=1))
    assert proposed["contexts"] == _contexts("Activity: verification", SEND)
    assert f"{proposed['max_pdu']} bytes; {query.GET_PDU} in retrievals" in PAGE
    assert f"at most {LARGEST_PDU} bytes" in PAGE


def test_what_is_proposed_for_storage(opened, config, tmp_path):
    """Each created class in the syntax in which it lies, and the other plain one."""
    items = [scu.StoredObject(uid, f"1.2.{number}", str(ExplicitVRLittleEndian), tmp_path / str(number))
             for number, uid in enumerate(sorted(CREATED))]
    proposed = _proposed(opened, lambda: scu.send(
        config.peer[0], items, calling_ae="NBDNODE", connect_timeout_s=1, dimse_timeout_s=1,
        on_answer=lambda _: None))
    assert proposed["contexts"] == _contexts("Activity: storage", SEND)
    assert proposed["count"] == 2 * len(CREATED)
    assert set(_contexts("Activity: storage", SEND)) == CREATED
    assert {row[1].strip("`") for row in _table("created SOP class")} == CREATED


def test_what_is_proposed_for_storage_commitment(opened, config, tmp_path):
    """The request with Verification beside it; the report in the role of the SCP."""
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        prover = proof.Prover(config, ledger, Spool(tmp_path), clock=lambda: 0.0)
        proposed = _proposed(opened, lambda: prover._transact({"id": 1}, config.peer[0], ["1.2"], {}, first=True))
        assert proposed["contexts"] == _contexts("Activity: storage commitment", SEND)
        assert not proposed["scp"]
        reporter = commitscp.Reporter(config, ledger, Spool(tmp_path), clock=lambda: 0.0)
        proposed = _proposed(opened, lambda: reporter._send(config.peer[0], []))
    assert proposed["contexts"] == _contexts("Activity: storage commitment report", SEND)
    assert proposed["scp"] == {"1.2.840.10008.1.20.1"}
    said = _part("Activity: storage commitment", SEND)
    assert f"At most {proof.MOST} instances" in said and f"kept for {proof.STAY_S:g} s" in said


def test_what_is_proposed_for_query_and_retrieval(opened, config):
    """C-FIND, C-MOVE and C-GET, Study Root."""
    with query.Asking(config.peer[0], TIMES) as asking:
        proposed = _proposed(opened, asking.studies)
    assert proposed["contexts"] == _contexts("Activity: query", QUERY)
    proposed = _proposed(opened, lambda: query.retrieve(config.peer[0], TIMES, study_uid="1.2"))
    assert proposed["contexts"] == _contexts("Activity: retrieve by C-MOVE", QUERY)
    proposed = _proposed(opened, lambda: query.retrieve(config.peer[0], TIMES, study_uid="1.2",
                                                        keep=lambda _: None))
    part = _part("Activity: retrieve by C-GET", QUERY)
    lists = {name.lower(): set(UID_IN_TEXT.findall(re.search(rf'{name}"?[^:|\n]*: ([^|]*?)\.(?:\s|$)', part)[1]))
             for name in ("Plain", "Compressed", "default")}
    written = {row[1].strip("`"): set().union(*(lists[word] for word in re.findall("plain|compressed|default", row[2])))
               for row in _table("SOP class | UID | transfer syntaxes", part)}
    assert proposed["contexts"] == written
    assert proposed["scp"] == {row[1].strip("`") for row in _table("SOP class | UID | transfer syntaxes", part)
                               if row[3] == "SCP"}
    assert f"More than {query.MAX_ANSWERS} answers" in QUERY


def test_a_requestor_says_who_it_is(tmp_path):
    """Implementation and PDU, read from the request that came to a peer."""
    seen: list[Any] = []
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", 0), block=False,
                             evt_handlers=[(evt.EVT_ACCEPTED, lambda event: seen.append(event.assoc.requestor))])
    peer = Peer(name="PACS", ae_title="PACS", host="127.0.0.1", port=server.server_address[1])
    scu.echo(peer, calling_ae="NBDNODE", connect_timeout_s=5, dimse_timeout_s=5)
    server.shutdown()
    assert str(seen[0].implementation_class_uid) == str(IMPLEMENTATION_CLASS_UID)
    assert seen[0].implementation_version_name == IMPLEMENTATION_VERSION_NAME
    assert seen[0].maximum_length == scu.MAX_PDU
    assert not seen[0].asynchronous_operations[0] > 1 and not seen[0].user_identity


# --- keys, limits, security, web


def test_the_query_keys():
    """As SCP, of each level; as SCU, those sent."""
    rows = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in _table("level | keys", RECEIVE)}
    assert rows == {level: {findscp.UNIQUE[level], *findscp.HEADER_KEYS[level], *findscp._COUNTED[level]}
                    for level in findscp.LEVELS}
    source = ast.parse((ROOT / "dicomnode" / "query.py").read_text(encoding="utf-8"))
    sent: dict[str, set[str]] = {}
    for call in ast.walk(source):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "_keys" and isinstance(call.args[0], ast.Constant):
            sent[call.args[0].value] = {keyword.arg or "" for keyword in call.keywords}
    written = {row[0]: set(re.findall(r"`([A-Z]\w+)`", row[1])) for row in _table("level | keys sent", QUERY)}
    assert written == sent


def test_limits_of_the_page_are_those_of_the_code():
    """Defaults of the configuration and constants."""
    default = Config()
    shared = {row[0]: row[1:] for row in _table("| as acceptor (RECEIVE)", PAGE)}
    reception = default.reception
    assert shared["simultaneous associations"][0].startswith(f"{reception.max_associations}, ")
    assert f"; {reception.max_associations_per_peer} of one" in shared["simultaneous associations"][0]
    for name, value in (("time to open", reception.acse_timeout_s), ("time for a message", reception.dimse_timeout_s),
                        ("silence", reception.network_timeout_s), ("longest association", reception.max_association_s)):
        assert shared[name][0].startswith(f"{value:g} s, ")
    assert shared["time to open"][1].startswith(f"{default.delivery.connect_timeout_s:g} s")
    assert f"{default.delivery.dimse_timeout_s:g} s, " in shared["time for a message"][1]
    assert f"{query.RETRIEVE_TIMEOUT_S:g} s between" in shared["time for a message"][1]
    assert f"more than {desk.HEADERS_A_QUERY} headers" in RECEIVE
    assert f"more than {desk.MOST_SUBOPERATIONS} matches" in RECEIVE
    assert {3: "Three"}[desk.RETRIEVALS] in RECEIVE and f"up to {desk.RETRIEVAL_WAIT_S:g} s" in RECEIVE
    assert f"up to {commitscp.DIGEST_BYTES // 2**20} MiB a request byte by byte" in RECEIVE
    assert commitscp.GIVE_UP_S == 86_400 and "tried again for a day" in RECEIVE
    assert {5: "after five attempts"}[delivery.REFUSALS] in SEND


def test_the_cipher_suites():
    """Those of TLS 1.2, in their order."""
    row = re.search(r"^\| cipher suites of TLS 1.2 \|([^|]*)\|$", _part("7 Security"), flags=re.MULTILINE)
    assert row is not None and tuple(re.findall(r"`([^`]+)`", row[1])) == TLS12_SUITES


def test_the_web_sender():
    """Size of requests, media types, and every HTTP status that is treated by itself."""
    part = _part("4.2.5 WEB SENDER (DICOMweb user agent)")
    assert f"at most {stow.REQUEST_INSTANCES} instances and {stow.REQUEST_BYTES // 2**20} MiB" in part
    accepted = {text.partition(";")[0].strip() for text in stow.RESPONSE_TYPES.split(",")}
    assert set(re.findall(r"`(application/[\w+]+)`", part)) == accepted
    code = re.compile(r"\b[2-5]\d\d\b")
    rows = {int(status) for row in _table("HTTP status | behaviour", part) for status in code.findall(row[0])}
    source = (ROOT / "dicomnode" / "stow.py").read_text(encoding="utf-8")
    send = re.search(r"def send\(.*?\n\n\n", source, re.DOTALL)
    refused = re.search(r"def _refused\(.*?\n    def", source, re.DOTALL)
    assert send is not None and refused is not None
    treated = {int(status) for text in (send[0], refused[0]) for status in code.findall(text)}
    assert rows == treated | set(stow.PER_INSTANCE)


# --- created objects


def test_what_is_set_anew_in_the_derived_pet(tmp_path):
    """Whatever differs from the parent slice is in annex B, and annex B names nothing that the writer never sets."""
    rows = _table("attribute | value | source", _part("B.1 PET image"))
    written = {keyword for row in rows for keyword in re.findall(r"`(\w+)`", row[0])}
    before, after = _derived(tmp_path)
    changed = {element.keyword or str(element.tag) for element in after
               if element.tag not in before or before[element.tag].value != element.value}
    assert changed <= written, changed - written
    modules = (ROOT / "sop" / "modules.py").read_text(encoding="utf-8") + (ROOT / "sop" / "pet.py").read_text(
        encoding="utf-8")
    assert {keyword for keyword in written if keyword not in modules} == set()
    assert "PixelData" in changed and before.Manufacturer == after.Manufacturer
    ours = {element.tag for element in after if element.tag.is_private}
    assert ours and ours <= {element.tag for element in before}


def _derived(folder: Path) -> tuple[Dataset, Dataset]:
    """A parent slice and the first derived slice made of it."""
    sources = source_series()
    after = read_back(derive(sources, folder / "derived")[0].files)[0]
    parent = after.SourceImageSequence[0].ReferencedSOPInstanceUID
    return next(ds for ds in sources if ds.SOPInstanceUID == parent), after


def test_what_goes_out_beside_the_derived_pet(tmp_path):
    """SOP class, modality and no private attribute of each companion, as they are really written."""
    start = origin(tmp_path)
    series = {kind: start.series(kind) for kind in KINDS}
    written = {
        "measurement report": report_object(told(), start, series["report"], mapping=series["mapping"]),
        "kernel": kernel_object(kernel(), (3.0, 2.0, 2.0), start, series["kernel"]),
        "QC pictures": picture_objects([("one", np.zeros((8, 8, 3), np.uint8))], start, series["pictures"])[0],
        "mapping to SUV": mapping_object(start, series["mapping"]),
    }
    rows = {row[0]: row for row in _table("object | IOD | modality", _part("B.2 Companions"))}
    assert set(rows) == set(written)
    classes = set()
    for name, content in written.items():
        made = read(content)
        classes.add(str(made.SOPClassUID))
        assert made.SOPClassUID.name.removesuffix(" Storage").removesuffix(" Image") in rows[name][1]
        assert made.Modality == rows[name][2]
        assert not [element for element in made.iterall() if element.tag.is_private], name
    assert classes | {"1.2.840.10008.5.1.4.1.1.128"} == CREATED
    assert set(MODALITIES.values()) == {row[2] for row in rows.values()} and set(MODALITIES) == set(KINDS)


def test_our_own_codes():
    """Scheme and values of everything that the companions say with a code of their own."""
    part = _part("Annex C: coded terminology")
    assert f"`{our_codes.OUR_SCHEME}`" in part
    used = set()
    for path in sorted((ROOT / "sop").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= {call.args[0].value for call in ast.walk(tree) if isinstance(call, ast.Call)
                 and ast.unparse(call.func) == "own" and isinstance(call.args[0], ast.Constant)}
        used |= {item.elts[0].value for node in ast.walk(tree) if isinstance(node, ast.Assign)
                 and ast.unparse(node.targets[0]) == "_AXES" and path.name == "report.py"
                 for item in node.value.elts}  # type: ignore[attr-defined]
    written = {code for row in _table("code | meaning", part) for code in re.findall(r"`([\w-]+)`", row[0])}
    assert written == used | {"g-NAME"}
