"""A node's data directory under a clock that the test moves, with series in it as if they had been received."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom import dcmwrite
from pydicom.dataset import Dataset

from dicomnode.config import Config, parse
from dicomnode.identity import SettingsRefused
from dicomnode.ledger import InstanceRow, Ledger
from dicomnode.matcher import Matcher
from dicomnode.pipeline import full_settings
from dicomnode.spool import Spool

PET_ROUTE = """
[[route]]
name = "all-pet"
when = { Modality = "PT" }
method = "nearest"
preset = "default"
send_to = ["PACS"]
"""


def full_settings_here(method: str, preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return full_settings(method, preset, overrides)
    except ValueError as error:
        raise SettingsRefused(str(error)) from error


class Line:
    """Ledger, spool and configuration below `folder`; `now` is what the clock says.

    `toml` is added to the configuration; one peer PACS at `port`, one route for all PET unless `route` says otherwise.
    """

    def __init__(self, folder: Path, *, port: int = 1, toml: str = "", route: str = PET_ROUTE) -> None:
        self.folder = folder
        self.config: Config = parse(
            f'[node]\ndata_dir = "{folder / "data"}"\n[completeness]\nquiet_s = 30\nct_wait_s = 600\n{toml}\n'
            f'[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {port}\n{route}')
        self.now = 1000.0
        self.spool = Spool(self.config.node.data_dir)
        self.ledger = Ledger(self.spool.ledger_path)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    def clock(self) -> float:
        return self.now

    def matcher(self, **options: Any) -> Matcher:
        """A matcher that asks the methods in this process, which is quicker than a child."""
        return Matcher(self.config, self.ledger, self.spool, clock=self.clock,
                       full_settings=full_settings_here, **options)

    def receive(self, datasets: Sequence[Dataset], *, calling_ae: str = "SCANNER") -> str:
        """Keep and enter the data sets, now; the SeriesInstanceUID of the last."""
        self.ledger.add_instances([self._kept(dataset, calling_ae) for dataset in datasets])
        return str(datasets[-1].SeriesInstanceUID)

    def _kept(self, ds: Dataset, calling_ae: str) -> InstanceRow:
        written = io.BytesIO()
        dcmwrite(written, ds, enforce_file_format=True)
        path = self.spool.object_path(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
        data_set = 144 + int.from_bytes(written.getvalue()[140:144], "little")  # behind the file meta information
        digest = hashlib.sha256(written.getvalue()[data_set:]).hexdigest()
        if self.ledger.known(ds.SOPInstanceUID) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(written.getvalue())
        return InstanceRow(
            sop_instance_uid=str(ds.SOPInstanceUID), sop_class_uid=str(ds.SOPClassUID),
            study_uid=str(ds.StudyInstanceUID), series_uid=str(ds.SeriesInstanceUID),
            transfer_syntax_uid=str(ds.file_meta.TransferSyntaxUID),
            path=self.spool.relative(path), bytes=len(written.getvalue()), sha256=digest, calling_ae=calling_ae,
            address="127.0.0.1", received_at=self.now, modality=str(ds.Modality),
            series_number=str(ds.get("SeriesNumber", "")), accession_number=str(ds.get("AccessionNumber", "")),
            series_description=str(ds.get("SeriesDescription", "")),
            position=tuple(map(float, ds.ImagePositionPatient)) if "ImagePositionPatient" in ds else None,
            orientation=tuple(map(float, ds.ImageOrientationPatient)) if "ImageOrientationPatient" in ds else None,
        )

    def state(self, series_uid: str) -> tuple[str, str]:
        """(state, code) of a series."""
        row = self.ledger.series(series_uid)
        return row["state"], row["code"]
