"""STOW-RS: what the server names as stored is stored, nothing else; the token stays secret; TLS is verified."""

from __future__ import annotations

import io
import json
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydicom import dcmread

from dicomnode import stow
from dicomnode.config import Peer, Tls, parse
from dicomnode.errors import ConfigError, PeerUnreachable
from dicomnode.scu import Answer
from tests.certificates import Authority
from tests.factories import pet_series
from tests.node.line import Line
from tests.node.test_commitment import prove
from tests.node.test_delivery import built, deliver, states
from tests.peers import free_port

BODY = "application/dicom+json"


class WebArchive:
    """A DICOMweb server in this process that parses multipart/related by RFC 2046 and RFC 2387, and forgives nothing.

    `verdict(uid)`: 0 stores, 0xBxxx stores with that WarningReason, another number fails with it, None says nothing.
    `refuse`: HTTP statuses to answer the next requests with, without a body.
    """

    def __init__(self, *, verdict: Callable[[str], int | None] = lambda _: 0, token: str = "", content_type: str = BODY,
                 tls: Any = None) -> None:
        self.verdict, self.token, self.content_type = verdict, token, content_type
        self.stored: list[str] = []
        self.hidden: set[str] = set()
        self.requests: list[list[str]] = []
        self.problems: list[str] = []
        self.refuse: list[int] = []
        self.limit = 10**9
        self.body: bytes | None = None
        archive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                archive.post(self)

            def do_GET(self) -> None:
                archive.get(self)

            def log_message(self, *_: Any) -> None:
                """Nothing on standard error."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}/dicom-web"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> WebArchive:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        if self.token and request.headers["Authorization"] != f"Bearer {self.token}":
            return _reply(request, 401)
        if len(body) > self.limit:
            return _reply(request, 413)
        if self.refuse:
            return _reply(request, self.refuse.pop(0))
        if request.path != "/dicom-web/studies":
            return _reply(request, 404)
        uids = []
        try:
            for part in parts(request.headers["Content-Type"], body):
                dataset = dcmread(io.BytesIO(part))
                uids.append((str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)))
        except (AssertionError, ValueError) as error:
            self.problems.append(str(error))
            return _reply(request, 400)
        self.requests.append([uid for _, uid in uids])
        stored, failed = [], []
        for sop_class, uid in uids:
            reason = self.verdict(uid)
            item: dict[str, Any] = {"00081150": _ui(sop_class), "00081155": _ui(uid)}
            if reason is None:
                continue
            if reason == 0 or reason >> 12 == 0xB:
                self.stored.append(uid)
                stored.append(item | ({"00081196": {"vr": "US", "Value": [reason]}} if reason else {}))
            else:
                failed.append(item | {"00081197": {"vr": "US", "Value": [reason]}})
        answer = {"00081190": {"vr": "UR", "Value": [self.url]}}
        answer |= {"00081199": {"vr": "SQ", "Value": stored}} if stored else {}
        answer |= {"00081198": {"vr": "SQ", "Value": failed}} if failed else {}
        return _reply(request, 409 if not stored else 202 if failed else 200, json.dumps(answer).encode()
                      if self.body is None else self.body, self.content_type)

    def get(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        if self.refuse:
            return _reply(request, self.refuse.pop(0))
        if not re.fullmatch(r"/dicom-web/studies(/[\d.]+/series/[\d.]+/instances)?", url.path):
            return _reply(request, 404)
        shown = [uid for uid in dict.fromkeys(self.stored) if uid not in self.hidden]
        offset = int(parse_qs(url.query).get("offset", ["0"])[0])
        page = [{"00080018": _ui(uid)} for uid in shown[offset:offset + 3]]  # a server that answers by threes
        return _reply(request, 200, json.dumps(page).encode(), BODY)


def _ui(uid: str) -> dict[str, Any]:
    return {"vr": "UI", "Value": [uid]}


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") == "chunked":
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            assert request.rfile.readline() == b"\r\n"
        request.rfile.readline()
        return body
    return request.rfile.read(int(request.headers["Content-Length"]))


def _reply(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", content_type: str = BODY) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    if body:
        request.send_header("Content-Type", content_type)
    if status == 302:
        request.send_header("Location", "/elsewhere")
    request.end_headers()
    request.wfile.write(body)


def parts(content_type: str, body: bytes) -> Iterator[bytes]:
    """The parts of a multipart/related message; AssertionError where a rule is broken."""
    kind, *parameters = [text.strip() for text in content_type.split(";")]
    values = dict(parameter.split("=", 1) for parameter in parameters)
    assert kind == "multipart/related" and values["type"].strip('"') == "application/dicom", content_type
    boundary = values["boundary"].strip('"').encode()
    assert 0 < len(boundary) <= 70, "RFC 2046 5.1.1"
    delimiter = b"--" + boundary
    assert body.startswith((delimiter + b"\r\n", b"\r\n" + delimiter + b"\r\n")), body[:80]
    head, *middle = body.split(b"\r\n" + delimiter) if body.startswith(b"\r\n") else (
        b"\r\n" + body).split(b"\r\n" + delimiter)
    assert head == b"" and middle and middle[-1] in (b"--", b"--\r\n"), "no closing delimiter"
    for part in middle[:-1]:
        assert part.startswith(b"\r\n")
        header, separator, content = part[2:].partition(b"\r\n\r\n")
        assert separator and re.search(rb"(?im)^content-type: *application/dicom", header), header
        assert content[128:132] == b"DICM", "PS3.10 file expected"
        yield content


def files(folder: Path, *, slices: int = 5) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for number, dataset in enumerate(pet_series(slices=slices)):
        dataset.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return sorted(folder.glob("*.dcm"))


def peer(url: str, **keys: Any) -> Peer:
    return Peer(name="WEB", ae_title="WEB", host="127.0.0.1", stow_url=url, **keys)


def send(destination: Peer, paths: list[Path], tls: Tls | None = None) -> list[Answer]:
    return stow.send(destination, paths, tls=tls or Tls(), on_answer=lambda _: None, connect_timeout_s=2, timeout_s=5)


@pytest.mark.parametrize("content_type", [BODY, "application/dicom+json; charset=utf-8", "application/json"])
def test_each_instance_gets_its_own_answer(tmp_path: Path, content_type: str) -> None:
    """Stored, stored with a warning, failed: as the server names them; the failed one is sent once more, alone."""
    paths = files(tmp_path / "in")
    uids = [str(dcmread(path).SOPInstanceUID) for path in paths]
    verdicts = dict(zip(uids, [0, 0xB000, 0xA700, 0, 0], strict=True))
    with WebArchive(verdict=lambda uid: verdicts[uid], content_type=content_type) as archive:
        answers = {answer.sop_instance_uid: answer.status for answer in send(peer(archive.url), paths)}
        assert archive.problems == []
        assert [len(request) for request in archive.requests] == [5, 1]
    assert answers == verdicts


def test_what_the_server_does_not_name_is_not_confirmed(tmp_path: Path) -> None:
    """Four of five named: four answers. None named, or no body, or no DICOM in it: not confirmed, tried again."""
    paths = files(tmp_path / "in")
    silent = str(dcmread(paths[0]).SOPInstanceUID)
    with WebArchive(verdict=lambda uid: None if uid == silent else 0) as archive:
        assert silent not in {answer.sop_instance_uid for answer in send(peer(archive.url), paths)}
        for body in (b"", b"{}", b"[1", b"<html>ok</html>"):
            archive.body = body
            with pytest.raises(PeerUnreachable, match="WEB"):
                send(peer(archive.url), paths)


def test_requests_are_bounded_and_halved_where_the_server_wants_less(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes of files and by number; a 413 halves a request until it fits."""
    paths = files(tmp_path / "in", slices=8)
    monkeypatch.setattr(stow, "REQUEST_INSTANCES", 6)
    with WebArchive() as archive:
        archive.limit = 3 * paths[0].stat().st_size + 2000
        answers = send(peer(archive.url), paths)
        assert len(answers) == 8 and all(answer.stored for answer in answers)
        assert [len(request) for request in archive.requests] == [3, 3, 2]
        assert sorted(archive.stored) == sorted({str(dcmread(path).SOPInstanceUID) for path in paths})


@pytest.mark.parametrize(("status", "said"), [
    (401, "stow_token_file"), (403, "stow_token_file"), (404, "root of its DICOMweb"), (429, "tried again"),
    (500, "tried again"), (503, "tried again"), (302, "redirects")])
def test_what_may_pass_or_be_mended_is_tried_again(tmp_path: Path, status: int, said: str) -> None:
    """HTTP errors that say nothing of the instances: PeerUnreachable with the remedy."""
    with WebArchive() as archive:
        archive.refuse = [status]
        with pytest.raises(PeerUnreachable, match=said):
            send(peer(archive.url), files(tmp_path / "in"))


@pytest.mark.parametrize(("status", "code"), [(400, 0xC000), (415, 0x0122), (413, 0xC000)])
def test_a_request_that_is_refused_for_what_it_holds_refuses_its_instance(
        tmp_path: Path, status: int, code: int) -> None:
    """Answers, so that the delivery is given up after some attempts and not after days."""
    with WebArchive() as archive:
        archive.refuse = [status] * 9
        (answer,) = send(peer(archive.url), files(tmp_path / "in", slices=1))
        assert answer.status == code and str(status) in answer.comment


def test_the_token_is_read_at_each_use_from_a_private_file_and_never_sent_in_clear(tmp_path: Path) -> None:
    """Renewed tokens are used; a file that others may read is refused; http is for this machine alone."""
    token = tmp_path / "token"
    token.write_text("first\n")
    token.chmod(0o600)
    paths = files(tmp_path / "in", slices=1)
    with WebArchive(token="second") as archive:
        destination = peer(archive.url, stow_token_file=token)
        with pytest.raises(PeerUnreachable, match="401") as refused:
            send(destination, paths)
        assert "first" not in str(refused.value)
        token.write_text("second\n")
        assert send(destination, paths)[0].stored
        token.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            send(destination, paths)
    token.chmod(0o600)
    with pytest.raises(ConfigError, match="https"):
        send(peer("http://pacs.example/dicom-web", stow_token_file=token), paths)


def test_a_server_that_is_down_or_silent_is_unreachable(tmp_path: Path) -> None:
    """With the remedy; nothing hangs."""
    with pytest.raises(PeerUnreachable, match="does not answer"):
        send(peer(f"http://127.0.0.1:{free_port()}/dicom-web"), files(tmp_path / "in", slices=1))


def test_tls_is_verified_by_the_authority_that_is_named_and_shows_our_certificate(tmp_path: Path) -> None:
    """Its own authority: stored. Another one, a name that does not fit, a pin of another certificate: refused."""
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    shown, client = ours.issue("server"), ours.issue("client", address=None)
    tls = Tls(certificate=client.certificate, key=client.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.certificate, shown.key)
    context.load_verify_locations(ours.path)
    context.verify_mode = ssl.CERT_REQUIRED
    paths = files(tmp_path / "in", slices=1)
    with WebArchive(tls=context) as archive:
        assert send(peer(archive.url, tls_ca=ours.path), paths, tls)[0].stored
        assert send(peer(archive.url, tls=True, certificate_sha256=(shown.sha256,)), paths, tls)[0].stored
        for destination in (peer(archive.url, tls_ca=other.path), peer(archive.url),
                            peer(archive.url.replace("127.0.0.1", "localhost"), tls_ca=ours.path),
                            peer(archive.url, tls=True, certificate_sha256=("0" * 64,)),
                            peer(archive.url, tls=True, tls_ca=ours.path, certificate_sha256=("0" * 64,))):
            with pytest.raises(PeerUnreachable, match="no TLS connection"):
                send(destination, paths, tls)
        assert len(archive.stored) == 2


def test_without_the_extra_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dicomweb-client is an extra."""
    monkeypatch.setitem(sys.modules, "dicomweb_client.web", None)
    with pytest.raises(ConfigError, match=r"dicomnode\[dicomweb\]"):
        send(peer("http://127.0.0.1:1/"), files(tmp_path / "in", slices=1))


@pytest.mark.parametrize(("text", "why"), [
    ('stow_url = "pacs/dicom-web"', "http or https"), ('stow_url = "https://me:secret@pacs/"', "name and password"),
    ('stow_token_file = "token"', "needs stow_url"), ('stow_url = "https://pacs/"\nconfirm = "commitment"', "no port")])
def test_an_address_that_cannot_serve_is_refused_at_the_start(text: str, why: str) -> None:
    """Not at the first delivery; a password is not shown again."""
    with pytest.raises(ConfigError, match=why) as refused:
        parse(f'[[peer]]\nname = "W"\nae_title = "W"\nhost = "h"\n{text}\n')
    assert "secret" not in str(refused.value)


WEB = """[delivery]
retry_s = 30
give_up_h = 2
connect_timeout_s = 2
dimse_timeout_s = 5
[[peer]]
name = "WEB"
ae_title = "WEB"
host = "127.0.0.1"
stow_url = "{url}"
confirm = "{confirm}"
"""


def test_a_job_is_delivered_by_stow_and_proven_by_qido(tmp_path: Path) -> None:
    """A full server first (0xA700), then stored; QIDO-RS, page by page, finds all: committed."""
    full = [True]
    with WebArchive(verdict=lambda _: 0xA700 if full else 0) as archive, \
            Line(tmp_path, toml=WEB.format(url=archive.url, confirm="find")) as line:
        job_id = built(line, send_to=("WEB",))
        deliver(line)
        (row,) = line.ledger.deliveries(job_id)
        assert row["state"] == "waiting" and "0xA700" in row["reason"]
        full.clear()
        line.now += 60
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"])
        prove(line)
        assert states(line, job_id) == ("committed", ["committed"])
        assert line.ledger.job(job_id)["reason"] == "WEB: QIDO-RS finds 4 of 4 instances at WEB"


def test_a_server_that_loses_an_instance_gets_it_again(tmp_path: Path) -> None:
    """QIDO-RS finds three of four, twice: the fourth is stored again, alone."""
    with WebArchive() as archive, Line(tmp_path, toml=WEB.format(url=archive.url, confirm="find")) as line:
        job_id = built(line, send_to=("WEB",))
        deliver(line)
        archive.hidden.add(archive.stored[0])
        for _ in range(2):
            prove(line)
            line.now += 60
        deliver(line)
        assert [len(request) for request in archive.requests] == [4, 1]
        archive.hidden.clear()
        prove(line)
        assert states(line, job_id) == ("committed", ["committed"])


def test_a_server_that_cannot_be_asked_waits(tmp_path: Path) -> None:
    """HTTP 503 to the query: nothing is lost, nothing is called committed."""
    with WebArchive() as archive, Line(tmp_path, toml=WEB.format(url=archive.url, confirm="find")) as line:
        job_id = built(line, send_to=("WEB",))
        deliver(line)
        archive.refuse = [503]
        prove(line)
        (row,) = line.ledger.deliveries(job_id)
        assert row["state"] == "delivered" and "503" in row["reason"] and row["proofs"] == 0
        line.now = row["prove_at"]
        prove(line)
        assert states(line, job_id) == ("committed", ["committed"])
