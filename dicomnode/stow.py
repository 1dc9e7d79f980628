"""Delivery over the web: STOW-RS (PS3.18 10.5) to store, QIDO-RS (PS3.18 10.6) to count; by dicomweb-client.

The answer of the server is read instance by instance: what it names as stored is stored, what it names as failed has
failed, what it does not name is not confirmed. The bearer token is read from its file at each use, so that it can be
renewed, and never travels unencrypted but to this machine itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydicom import dcmread
from pydicom.dataset import Dataset

from dicomnode.config import Peer, Tls
from dicomnode.errors import ConfigError, PeerUnreachable
from dicomnode.logs import get_logger
from dicomnode.scu import CANNOT_ENCODE, SOP_CLASS_NOT_SUPPORTED, Answer, is_warning
from dicomnode.secretfiles import read_secret
from dicomnode.tls import PeerContext, client_context

__all__ = ["check", "instances", "send"]

REQUEST_BYTES = 32 * 2**20  # of files in one request: it is built in memory, and repeated whole when it breaks
REQUEST_INSTANCES = 100
PER_INSTANCE = (200, 202, 409)  # PS3.18 Table 10.5.3-1: the body tells what became of each instance
RESPONSE_TYPES = "application/dicom+json, application/json;q=0.9, application/dicom+xml;q=0.5"
PAGES = 1000  # of a QIDO-RS answer, at most

log = get_logger(__name__)


def send(peer: Peer, files: Sequence[Path], *, tls: Tls, on_answer: Callable[[Answer], None],
         connect_timeout_s: float, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> list[Answer]:
    """Store DICOM files by requests of bounded size; the last answer to each that the server named.

    Every answer is reported through `on_answer` as it comes. An instance that is not stored is sent once more by
    itself. `stopped` is asked between requests.

    Raises PeerUnreachable where trying again later may help, ConfigError for token file, certificates and extra.
    """
    answers: dict[str, Answer] = {}

    def take(found: list[Answer]) -> None:
        for answer in found:
            answers[answer.sop_instance_uid] = answer
            on_answer(answer)

    batches = list(_batches(files))
    with _Server(peer, tls, connect_timeout_s, timeout_s) as server:
        while batches and not stopped():
            batch = batches.pop(0)
            status, found = server.store(batch)
            if status in (400, 413) and len(batch) > 1:  # too large, or one spoils all
                half = len(batch) // 2
                batches[:0] = [batch[:half], batch[half:]]
                continue
            take(found)
            failed = {answer.sop_instance_uid for answer in found if not answer.stored}
            for path in batch if failed and len(batch) > 1 else ():
                if not stopped() and _uid(path) in failed:
                    take(server.store([path])[1])
    return list(answers.values())


def instances(peer: Peer, study_uid: str, series_uid: str, *, tls: Tls, connect_timeout_s: float,
              timeout_s: float) -> list[str]:
    """The SOP Instance UIDs of a series at the server, by QIDO-RS. Raises PeerUnreachable and ConfigError."""
    with _Server(peer, tls, connect_timeout_s, timeout_s) as server:
        return server.instances(study_uid, series_uid)


def check(peer: Peer, *, tls: Tls, connect_timeout_s: float, timeout_s: float) -> str:
    """Whether the server can be asked (QIDO-RS for one study); what it said. Raises PeerUnreachable and ConfigError."""
    with _Server(peer, tls, connect_timeout_s, timeout_s) as server:
        return server.check()


def _uid(path: Path) -> str:
    return str(dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in files:
        bytes_ = path.stat().st_size
        if batch and (size + bytes_ > REQUEST_BYTES or len(batch) >= REQUEST_INSTANCES):
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += bytes_
    if batch:
        yield batch


class _Server:
    """One DICOMweb server, by one session."""

    def __init__(self, peer: Peer, tls: Tls, connect_timeout_s: float, timeout_s: float) -> None:
        try:
            import requests
            from dicomweb_client.web import DICOMwebClient
        except ImportError as error:
            raise ConfigError(f"peer {peer.name} has stow_url, and dicomweb-client is not installed. "
                              "Remedy: pip install 'dicomnode[dicomweb]', or remove stow_url.") from error
        assert peer.stow_url is not None
        self._named = f"peer {peer.name} (STOW-RS at {peer.stow_url})"
        self._errors = requests.exceptions
        self._context: PeerContext | None = None
        self._session = session = requests.Session()
        session.trust_env = False  # no proxy, password or authority that the configuration does not name
        session.max_redirects = 0
        session.headers.update({"Accept": RESPONSE_TYPES, **_authorization(peer)})
        if urlsplit(peer.stow_url).scheme == "https" and (peer.tls_ca or tls.ca or peer.certificate_sha256):
            self._context = client_context(tls, peer)
            authority = peer.tls_ca or tls.ca
            session.verify = str(authority) if authority else False  # pins alone: the context holds them
            session.mount("https://", _adapter(self._context))
        try:
            self._client = DICOMwebClient(peer.stow_url.rstrip("/"), session=session, callback=_plain_content_type,
                                          permissive_uid=True, timeout=(connect_timeout_s, timeout_s))
        except ValueError as error:
            raise ConfigError(f"stow_url of peer {peer.name}: {error}") from error
        self._client.set_http_retry_params(retry=False)  # the delivery queue decides when to try again

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def store(self, files: Sequence[Path]) -> tuple[int, list[Answer]]:
        """One request: (HTTP status, answer per instance that the server named)."""
        datasets = [dcmread(path) for path in files]
        uids = {str(dataset.SOPInstanceUID) for dataset in datasets}
        try:
            answer: Any = self._client.store_instances(datasets)
            return 200, self._understood(answer, uids, 200)
        except self._errors.HTTPError as error:
            if error.response is None:
                raise PeerUnreachable(f"{self._named} does not answer: {error}") from error
            return error.response.status_code, self._refused(error.response, uids)
        except (self._errors.RequestException, OSError) as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError, SyntaxError) as error:
            raise PeerUnreachable(f"{self._named} answered what is no DICOM JSON or XML: {error}") from error

    def _understood(self, answer: Dataset, uids: set[str], code: int) -> list[Answer]:
        """PS3.18 Table 10.5.3-2, PS3.3 C.38.2: who is named as stored, and who as failed."""
        found: dict[str, Answer] = {}
        for item in answer.get("ReferencedSOPSequence") or []:
            uid = str(item.get("ReferencedSOPInstanceUID", ""))
            reason = _number(item.get("WarningReason"))
            found[uid] = Answer(uid, 0x0000) if not reason else Answer(
                uid, reason if is_warning(reason) else 0xB000, f"WarningReason 0x{reason:04X}")
        for item in answer.get("FailedSOPSequence") or []:
            uid = str(item.get("ReferencedSOPInstanceUID", ""))
            reason = _number(item.get("FailureReason")) or CANNOT_ENCODE
            stored = reason == 0 or is_warning(reason)
            found[uid] = Answer(uid, 0x0110 if stored else reason, f"FailureReason 0x{reason:04X}")
        named = [found[uid] for uid in sorted(uids & found.keys())]
        if not named:
            raise PeerUnreachable(f"{self._named} answered HTTP {code} and names none of the {len(uids)} instances: "
                                  "not confirmed. Remedy: does it answer STOW-RS with a body (PS3.18 10.5.3)?")
        return named

    def _refused(self, response: Any, uids: set[str]) -> list[Answer]:
        """An HTTP error: answers where it speaks of the instances, PeerUnreachable where it may pass or be mended."""
        code = response.status_code
        if code in PER_INSTANCE:
            body = _decoded(response)
            if body is not None:
                return self._understood(body, uids, code)
        if code in (406, 415):
            status = SOP_CLASS_NOT_SUPPORTED
        elif code in (400, 409, 413, 422):
            status = CANNOT_ENCODE
        else:
            raise PeerUnreachable(f"{self._named} answered HTTP {code} {response.reason}. {_remedy(code)}")
        return [Answer(uid, status, f"HTTP {code} {response.reason}"[:64]) for uid in sorted(uids)]

    def instances(self, study_uid: str, series_uid: str) -> list[str]:
        """SOP Instance UIDs, page after page until one brings nothing new."""
        found: dict[str, None] = {}
        try:
            for _ in range(PAGES):
                page = self._client.search_for_instances(study_uid, series_uid, fields=["SOPInstanceUID"],
                                                         offset=len(found) or None)
                new = [uid for item in page if (uid := _json_uid(item)) and uid not in found]
                if not new:
                    break
                found.update(dict.fromkeys(new))
        except self._errors.HTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            if code != 404:  # PS3.18 10.6.3: some servers say so of a series that they do not have
                raise PeerUnreachable(f"{self._named} answered the query with HTTP {code}. {_remedy(code)}") from error
        except (self._errors.RequestException, OSError) as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise PeerUnreachable(f"{self._named} answered what is no DICOM JSON: {error}") from error
        return list(found)

    def check(self) -> str:
        try:
            self._client.search_for_studies(limit=1)
        except self._errors.HTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            if code in (404, 405, 406, 501):
                return f"{self._named} answers; it does not offer QIDO-RS (HTTP {code})"
            raise PeerUnreachable(f"{self._named} answered HTTP {code}. {_remedy(code)}") from error
        except (self._errors.RequestException, OSError) as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise PeerUnreachable(f"{self._named} answered what is no DICOM JSON: {error}") from error
        return f"{self._named} answers QIDO-RS"

    def _unreachable(self, error: Exception) -> PeerUnreachable:
        if isinstance(error, self._errors.TooManyRedirects):
            return PeerUnreachable(f"{self._named} redirects. Remedy: set stow_url to where it leads.")
        if isinstance(error, self._errors.SSLError):
            why = (self._context.failure if self._context else "") or str(error)
            return PeerUnreachable(f"{self._named}: no TLS connection: {why}. Remedy: peer.tls_ca must hold the "
                                   "authority that signed its certificate.")
        if isinstance(error, self._errors.Timeout):
            return PeerUnreachable(f"{self._named} did not answer in time. Remedy: is it running, and quick enough for "
                                   "delivery.dimse_timeout_s?")
        return PeerUnreachable(f"{self._named} does not answer: {type(error).__name__}. "
                               "Remedy: check stow_url, name service and firewall; is it running?")


def _authorization(peer: Peer) -> Mapping[str, str]:
    """The header of the token file, read now. Raises ConfigError."""
    if peer.stow_token_file is None:
        return {}
    parts = urlsplit(str(peer.stow_url))
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(f"peer {peer.name} has stow_token_file, and stow_url is not https: the token would travel "
                          "readable. Remedy: use https.")
    return {"Authorization": f"Bearer {read_secret(peer.stow_token_file, what='stow_token_file')}"}


def _adapter(context: ssl.SSLContext) -> Any:
    """An HTTP adapter whose connections use our TLS context."""
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
            # Where the context does not ask for the host name, a pinned certificate stands in for it.
            extra = {} if context.check_hostname else {"assert_hostname": False}
            super().init_poolmanager(connections, maxsize, block, ssl_context=context, **extra, **options)

    return Adapter()


def _plain_content_type(response: Any, *_: Any, **__: Any) -> Any:
    """dicomweb-client knows media types without parameters: `application/dicom+json; charset=utf-8` would be lost."""
    if "Content-Type" in response.headers:
        response.headers["Content-Type"] = response.headers["Content-Type"].partition(";")[0].strip().lower()
    return response


def _decoded(response: Any) -> Dataset | None:
    """The data set in the body of an error, None where it holds none."""
    if "json" not in response.headers.get("Content-Type", ""):
        return None
    try:
        return Dataset.from_json(response.json())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the body of an HTTP error is no DICOM JSON", action="stow_body", error=str(error)[:200])
        return None


def _json_uid(item: Any) -> str:
    values = item.get("00080018", {}).get("Value") if isinstance(item, dict) else None
    return str(values[0]) if values else ""


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _remedy(code: int) -> str:
    """
    >>> _remedy(401)
    'Remedy: renew stow_token_file, or let the server accept it.'
    """
    if code in (401, 403, 407):
        return "Remedy: renew stow_token_file, or let the server accept it."
    if code in (404, 405, 501):
        return "Remedy: stow_url must be the root of its DICOMweb services, the part before /studies."
    return "It is tried again; look into the log of the server if it stays so."
