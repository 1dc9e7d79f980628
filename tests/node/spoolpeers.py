"""A receiving process with a study in its spool, a derived series beside it, and peers that ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association

from dicomnode.ledger import Ledger
from tests.factories import make_uid
from tests.peers import ReceiverProcess, associate, encoded, store_encoded

STUDY_FIND, STUDY_MOVE, STUDY_GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))
PATIENT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"
PUSH_MODEL, PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"


def peers(*, store_port: int = 0, extra: str = "") -> str:
    """SCANNER sends and asks, VIEWER asks alone, MUTE sends alone, PACS (at `store_port`) sends and takes."""
    tables = [("SCANNER", "may_query = true"), ("VIEWER", "may_query = true\nmay_send = false"), ("MUTE", ""),
              ("PACS", f"may_query = true\nport = {store_port}" if store_port else "")]
    return extra + "\n".join(f'[[peer]]\nname = "{name}"\nae_title = "{name}"\nhost = "127.0.0.1"\n{more}'
                             for name, more in tables)


def send(receiver: ReceiverProcess, datasets: Sequence[Dataset], *, calling: str = "SCANNER") -> None:
    """All of them by C-STORE, over one association."""
    contexts = {(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)) for ds in datasets}
    assoc = associate(receiver.port, [(uid, [syntax]) for uid, syntax in contexts], calling=calling)
    for ds in datasets:
        answer = store_encoded(assoc, ds.SOPClassUID, ds.SOPInstanceUID, encoded(ds))
        assert answer.Status == 0x0000, answer
    assoc.release()


def add_derived(ledger: Ledger, data_dir: Path, datasets: Sequence[Dataset], *, state: str) -> str:
    """A job with these data sets as its derived series, in `state`; the SeriesInstanceUID."""
    first = datasets[0]
    folder = data_dir / "derived" / str(make_uid(first.SeriesInstanceUID, state))
    folder.mkdir()
    for ds in datasets:
        ds.save_as(folder / f"{ds.SOPInstanceUID}.dcm", enforce_file_format=True)
    with ledger.transaction() as db:
        db.execute(
            "INSERT INTO job (identity, series_uid, study_uid, route, method, preset, settings, send_to, inputs, "
            "state, run_after, created_at, built_at, derived_series_uid, derived_path, derived_instances) "
            "VALUES (?, '1.1', ?, 'r', 'm', 'p', '{}', '[]', '[]', ?, 0, 0, 1, ?, ?, ?)",
            (folder.name, first.StudyInstanceUID, state, first.SeriesInstanceUID, f"derived/{folder.name}",
             len(datasets)))
    return str(first.SeriesInstanceUID)


def identifier(level: str, **keys: Any) -> Dataset:
    """What a peer asks: every keyword with its value, "" for universal."""
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(ds, keyword, value)
    return ds


def find(port: int, asked: Dataset, *, model: str = STUDY_FIND, calling: str = "VIEWER") -> tuple[int, list[Dataset]]:
    """The final status and the answers."""
    assoc = associate(port, [(model, [ExplicitVRLittleEndian])], calling=calling)
    assert assoc.is_established
    answers, status = [], -1
    for response, got in assoc.send_c_find(asked, model):
        status = response.Status
        if got is not None:
            answers.append(got)
    assoc.release()
    return status, answers


def move(port: int, asked: Dataset, destination: str, *,
         calling: str = "VIEWER") -> list[tuple[Dataset, Dataset | None]]:
    """All responses with their identifiers."""
    assoc = associate(port, [(STUDY_MOVE, [ExplicitVRLittleEndian])], calling=calling)
    assert assoc.is_established
    responses = list(assoc.send_c_move(asked, destination, STUDY_MOVE))
    assoc.release()
    return responses


def counts(response: Dataset) -> tuple[int, int, int]:
    """completed, failed, warning."""
    return (response.NumberOfCompletedSuboperations, response.NumberOfFailedSuboperations,
            response.NumberOfWarningSuboperations)


def get(port: int, asked: Dataset, classes: Sequence[tuple[str, str]], *, calling: str = "VIEWER",
        status: int = 0x0000) -> tuple[list[tuple[Dataset, Dataset | None]], list[Dataset]]:
    """C-GET with us as the Storage SCP for (SOP class, transfer syntax): the responses, and what came."""
    from pynetdicom import build_role

    came: list[Dataset] = []

    def on_store(event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        came.append(dataset)
        return status

    ae = AE(calling)
    ae.dimse_timeout = ae.acse_timeout = 20
    contexts = [build_context(STUDY_GET), *(build_context(uid, syntax) for uid, syntax in classes)]
    assoc = ae.associate("127.0.0.1", port, contexts, ae_title="NBDNODE", evt_handlers=[(evt.EVT_C_STORE, on_store)],
                         ext_neg=[build_role(uid, scp_role=True) for uid, _ in classes])
    assert assoc.is_established
    responses = list(assoc.send_c_get(asked, STUDY_GET))
    assoc.release()
    return responses, came


def associated(port: int, *contexts: str, calling: str = "SCANNER") -> Association:
    """An established association for these SOP classes."""
    assoc = associate(port, [(uid, [ExplicitVRLittleEndian]) for uid in contexts], calling=calling)
    assert assoc.is_established
    return assoc
