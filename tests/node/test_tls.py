"""DICOM TLS both ways: who comes in with which certificate, what we send to, what is refused and recorded."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode import scu, tls
from dicomnode.config import ConfigError, Peer, Tls, parse
from dicomnode.errors import PeerUnreachable
from dicomnode.secretfiles import read_secret
from tests.certificates import NOW, Authority, Certificate
from tests.factories import ct_series
from tests.fuzzrun import fuzz_streams
from tests.peers import (
    DCMTK_ENV,
    REPOSITORY,
    Orthanc,
    ReceiverProcess,
    associate,
    echoscu,
    free_port,
    store_encoded,
    storescu,
    wait_until,
)
from tests.peers import encoded as encoded_data_set

CT = [(CTImageStorage, [ExplicitVRLittleEndian])]
NOT_RECOGNISED, NO_REASON = (1, 1, 3), (1, 1, 1)


class Site:
    """Two authorities, certificates, and a receiver with a plain and a TLS port."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.other = Authority(folder), Authority(folder, "other")
        self.node = self.authority.issue("node", use_rsa=True, password="correct horse")
        self.scanner, self.pinned = self.authority.issue("scanner"), self.authority.issue("pinned", use_rsa=True)
        self.ward, self.stranger = self.other.issue("ward"), self.other.issue("stranger")
        self.expired = self.authority.issue("expired", days=-1)
        password = folder / "node.pass"
        password.touch(mode=0o600)
        password.write_text("correct horse\n")
        self.port = free_port()
        self.tls = (f'[tls]\nport = {self.port}\ncertificate = "{self.node.certificate}"\nkey = "{self.node.key}"\n'
                    f'key_password_file = "{password}"\nca = "{self.authority.path}"\n')
        known = {"SCANNER": "", "SECURE": "tls = true", "WARD": f'tls = true\ntls_ca = "{self.other.path}"',
                 "PINNED": f'tls = true\ncertificate_sha256 = ["{self.pinned.sha256.upper()}"]'}
        peers = "".join(f'[[peer]]\nname = "{name}"\nae_title = "{name}"\nhost = "127.0.0.1"\n{more}\n'
                        for name, more in known.items())
        self.receiver = ReceiverProcess(folder / "node", peers=self.tls + peers,
                                        reception="low_disk_mb = 1\nacse_timeout_s = 3")

    def options(self, shown: Certificate) -> list[str]:
        """DCMTK's."""
        return ["+tls", str(shown.key), str(shown.certificate), "+cf", str(self.authority.path)]

    def events(self, code: str) -> list[str]:
        with self.receiver.ledger() as ledger:
            return [event["reason"] for event in ledger.events() if event["code"] == code]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("tls"))
    with made.receiver:
        yield made


def client(site: Site, shown: Certificate | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(site.authority.path))
    if shown is not None:
        context.load_cert_chain(shown.certificate, shown.key)
    return context


def over_tls(site: Site, shown: Certificate | None, calling: str) -> Association:
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    for _ in range(5):
        association = ae.associate("127.0.0.1", site.port, [build_context(*CT[0])], ae_title="NBDNODE",
                                   tls_args=(client(site, shown), "127.0.0.1"))
        if association.is_established or association.is_rejected or shown is None:
            break  # pynetdicom's requestor takes a rejection for an abort when the answer is there before it looks
    return association


def rejection(association: Association) -> tuple[int, int, int]:
    assert association.is_rejected
    answer = association.acceptor.primitive
    return answer.result, answer.result_source, answer.diagnostic


def ct(number: int) -> Dataset:
    return ct_series(slices=1, seed=number)[0]


# --- they come to us


def test_dcmtk_stores_over_tls_and_the_object_is_kept_as_sent(site: Site, tmp_path: Path):
    """storescu with its default profile and a certificate of our authority; the key of the node has a password."""
    dataset = ct(1)
    dataset.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    done = storescu(site.port, [tmp_path / "ct.dcm"], calling="SECURE", options=["-R", *site.options(site.scanner)])
    assert done.returncode == 0, done.stderr
    with site.receiver.ledger() as ledger:
        row = ledger.known(dataset.SOPInstanceUID)
    assert row is not None
    assert (site.receiver.data_dir / row["path"]).read_bytes().endswith(encoded_data_set(dataset))


def test_large_objects_pass_as_whole_pdus_and_as_crumbs(site: Site):
    """TLS hands over 16 kB records, the kernel knows nothing of what it holds back: nothing stalls."""
    association = over_tls(site, site.scanner, "SCANNER")
    assert association.is_established
    began = time.monotonic()
    for number in range(5):
        dataset = ct_series(slices=1, seed=50 + number, rows=700, columns=700)[0]
        answer = store_encoded(association, CTImageStorage, dataset.SOPInstanceUID, encoded_data_set(dataset))
        assert answer.Status == 0
    association.release()
    assert association.is_released
    assert time.monotonic() - began < 20


def test_a_certificate_is_asked_for_and_must_be_one_that_we_accept(site: Site):
    """None, or one whose time is over: no association, and the record says why."""
    assert not over_tls(site, None, "SECURE").is_established
    wait_until("the record", lambda: any("peer did not return a certificate" in text for text in site.events("tls")))
    assert not over_tls(site, site.expired, "SECURE").is_established
    association = over_tls(site, site.scanner, "SECURE")
    assert association.is_established
    association.release()


@pytest.mark.parametrize(("shown", "calling", "accepted"), [
    ("scanner", "SCANNER", True), ("scanner", "SECURE", True), ("pinned", "PINNED", True), ("ward", "WARD", True),
    ("scanner", "PINNED", False),  # signed by the right authority, not the certificate that is pinned
    ("pinned", "SECURE", False),  # pinned to another peer
    ("pinned", "SCANNER", False),
    ("scanner", "WARD", False),  # the common authority, where the peer has its own
    ("ward", "SECURE", False),  # another peer's authority
    ("stranger", "SCANNER", False),
])
def test_a_certificate_opens_the_door_of_its_own_peer_only(site: Site, shown: str, calling: str, accepted: bool):
    """The AE title says who it claims to be, the certificate must be one of that peer."""
    association = over_tls(site, getattr(site, shown), calling)
    if accepted:
        assert association.is_established
        association.release()
        return
    assert rejection(association) == NO_REASON
    wait_until("the record", lambda: [text for text in site.events("certificate") if calling in text])


def test_a_peer_with_tls_does_not_come_in_without(site: Site):
    """Right title and address on the plain port: refused and recorded; a peer without tls = true may."""
    assert rejection(associate(site.receiver.port, CT, calling="SECURE")) == NO_REASON
    assert wait_until("the record", lambda: site.events("tls_required"))
    assert echoscu(site.receiver.port, calling="SCANNER").returncode == 0


@pytest.mark.parametrize(("version", "suites"), [
    (ssl.TLSVersion.TLSv1_1, "DEFAULT:@SECLEVEL=0"),
    (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES128-SHA256:@SECLEVEL=0"),  # CBC
    (ssl.TLSVersion.TLSv1_2, "AES128-GCM-SHA256"),  # no forward secrecy
])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_what_the_profile_does_not_name_is_not_negotiated(site: Site, version: ssl.TLSVersion, suites: str):
    """BCP 195: no TLS 1.1, no CBC, no RSA key exchange, whatever the other side offers."""
    context = client(site, site.scanner)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = version
    context.set_ciphers(suites)
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.parametrize("suite", tls.TLS12_SUITES)
def test_each_suite_of_the_profile_fits_one_kind_of_key(site: Site, suite: str):
    """The node's key is RSA: the two RSA suites are agreed on, the two ECDSA ones are not."""
    context = client(site, site.scanner)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suite)
    with socket.create_connection(("127.0.0.1", site.port), timeout=5) as plain:
        if "ECDSA" in suite:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(plain, server_hostname="127.0.0.1")
            return
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            assert (connection.version(), connection.cipher()[0], connection.compression()) == ("TLSv1.2", suite, None)


def test_silent_connections_and_plain_dicom_keep_nobody_waiting(site: Site):
    """20 connections that never shake hands, one that speaks plain DICOM: others are served at once, all are closed."""
    silent = [socket.create_connection(("127.0.0.1", site.port), timeout=20) for _ in range(20)]
    association = over_tls(site, site.scanner, "SECURE")
    assert association.is_established
    assert not select.select(silent, [], [], 0)[0], "it waited for the silent ones"
    association.release()
    assert echoscu(site.port, calling="SCANNER").returncode != 0  # plain on the TLS port
    for connection in silent:
        assert connection.recv(1) == b"", "closed after reception.acse_timeout_s"
        connection.close()
    assert site.events("tls")


@pytest.mark.filterwarnings("ignore")
def test_the_tls_port_outlives_rubbish_before_and_inside_the_handshake(site: Site):
    """Random bytes, a handshake with flipped bits, mutated associations inside TLS: good ones are served as before."""
    rng = random.Random(7)
    hello, unused = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client(site, site.scanner).wrap_bio(unused, hello, server_hostname="127.0.0.1").do_handshake()
    greeting = hello.read()
    for number in range(100):
        data = bytearray(greeting if number % 2 else rng.randbytes(rng.choice((1, 5, 300))))
        for _ in range(3):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with socket.create_connection(("127.0.0.1", site.port), timeout=5) as plain:
            plain.sendall(data)
    report = fuzz_streams(60, site.receiver, seed=3, secure=(site.port, client(site, site.scanner)))
    assert report.cases == 60 and not report.failures, "\n".join(report.failures[:5])
    association = over_tls(site, site.scanner, "SECURE")
    assert association.is_established
    association.release()


def test_tls_on_the_plain_port_is_recorded_and_harms_nothing(site: Site):
    """The first byte of a handshake is no PDU."""
    with socket.create_connection(("127.0.0.1", site.receiver.port), timeout=5) as plain, pytest.raises(OSError):
        client(site, site.scanner).wrap_socket(plain, server_hostname="127.0.0.1")
    assert wait_until("the record", lambda: site.events("no_association"))
    assert echoscu(site.receiver.port).returncode == 0


def test_renewed_certificates_are_used_without_a_restart(tmp_path: Path):
    """The files are read again when they changed; broken ones leave the last good certificate in use."""
    authority = Authority(tmp_path)
    first = authority.issue("node")
    settings = Tls(port=2762, certificate=first.certificate, key=first.key, ca=authority.path)
    server = tls.ServerTls(settings, [])
    before = server.context()
    assert server.context() is before
    authority.issue("node")
    os.utime(first.certificate, (1, 1))
    renewed = server.context()
    assert renewed is not before
    first.key.write_text("broken")
    assert server.context() is renewed


# --- we go to them


class TlsStore:
    """A storage peer over TLS, in this process."""

    def __init__(self, shown: Certificate, authority: Authority) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(shown.certificate, shown.key)
        context.load_verify_locations(authority.path)
        context.verify_mode = ssl.CERT_REQUIRED
        ae = AE("PACS")
        ae.supported_contexts = [build_context(Verification)]
        self.port = free_port()
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, ssl_context=context,
                                       evt_handlers=[(evt.EVT_C_ECHO, lambda _: 0)])

    def __enter__(self) -> TlsStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


def pacs(site: Site, port: int, **settings: object) -> Peer:
    """A [[peer]] as the configuration makes it, with our certificate."""
    config = parse(site.tls)
    peer = Peer.model_validate({"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": port, "tls": True,
                                **settings})
    return config.model_validate(config.model_dump() | {"peer": [peer]}).peer[0]


def echo(peer: Peer) -> None:
    scu.echo(peer, calling_ae="NBDNODE", connect_timeout_s=5, dimse_timeout_s=5)


def test_we_send_over_tls_to_dcmtk_with_our_certificate(site: Site, tmp_path: Path):
    """storescp that asks for a certificate keeps the object as it was."""
    port = free_port()
    (tmp_path / "out").mkdir()
    dataset = ct(2)
    dataset.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    peer = subprocess.Popen(["/usr/bin/storescp", *site.options(site.scanner), "-rc", "-aet", "PACS", "-od",
                             str(tmp_path / "out"), str(port)], env=DCMTK_ENV, stderr=subprocess.DEVNULL)
    try:
        wait_until("storescp to listen", lambda: _listens(port))
        answers = scu.send(pacs(site, port), [tmp_path / "ct.dcm"], calling_ae="NBDNODE", connect_timeout_s=5,
                           dimse_timeout_s=5, on_answer=lambda _: None)
    finally:
        peer.kill()
        peer.wait()
    assert [answer.status for answer in answers] == [0]
    (stored,) = (tmp_path / "out").iterdir()
    assert stored.read_bytes().endswith(encoded_data_set(dataset))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_peer_must_be_the_one_we_mean(site: Site):
    """Authority and host name, or the pinned certificate; each failure says what does not fit."""
    elsewhere, unknown = site.authority.issue("elsewhere", address="192.0.2.7"), site.stranger
    with TlsStore(site.scanner, site.authority) as right:
        echo(pacs(site, right.port))
        echo(pacs(site, right.port, certificate_sha256=[site.scanner.sha256]))
        with pytest.raises(PeerUnreachable, match=r"not in peer\.certificate_sha256"):
            echo(pacs(site, right.port, certificate_sha256=[site.pinned.sha256]))
        with pytest.raises(PeerUnreachable, match="its certificate is not accepted"):
            echo(pacs(site, right.port, tls_ca=site.other.path))
    with TlsStore(elsewhere, site.authority) as wrong:
        with pytest.raises(PeerUnreachable, match=r"not valid for '127\.0\.0\.1'"):
            echo(pacs(site, wrong.port))
        echo(pacs(site, wrong.port, certificate_sha256=[elsewhere.sha256]))
    with TlsStore(unknown, site.authority) as wrong:
        with pytest.raises(PeerUnreachable, match="Remedy"):
            echo(pacs(site, wrong.port))
        echo(pacs(site, wrong.port, tls_ca=site.other.path))


def test_we_never_fall_back_to_plain(site: Site):
    """The peer speaks plain DICOM: no association, and the reason says so."""
    with pytest.raises(PeerUnreachable, match="it does not speak TLS there"):
        echo(pacs(site, site.receiver.port))


def test_a_peer_that_never_shakes_hands_is_given_up(site: Site):
    """connect_timeout_s holds for the handshake, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(PeerUnreachable, match="too long"):
            scu.echo(pacs(site, silent.getsockname()[1]), calling_ae="NBDNODE", connect_timeout_s=0.5,
                     dimse_timeout_s=5)
        assert time.monotonic() - began < 4


@pytest.mark.slow
def test_orthanc_and_the_node_exchange_over_tls(site: Site, tmp_path: Path):
    """A real Orthanc with DicomTlsEnabled: we send to it, and it sends back what it holds."""
    orthanc = site.authority.issue("orthanc")
    settings = {"DicomTlsEnabled": True, "DicomTlsCertificate": str(orthanc.certificate),
                "DicomTlsPrivateKey": str(orthanc.key), "DicomTlsTrustedCertificates": str(site.authority.path),
                "DicomTlsRemoteCertificateRequired": True,
                "DicomModalities": {"node": {"AET": "NBDNODE", "Host": "127.0.0.1", "Port": site.port,
                                             "LocalAet": "SECURE", "UseDicomTls": True}}}
    dataset = ct(3)
    dataset.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    with Orthanc(tmp_path / "orthanc", settings=settings) as peer:
        answers = scu.send(pacs(site, peer.port, ae_title="ORTHANC"), [tmp_path / "ct.dcm"], calling_ae="NBDNODE",
                           connect_timeout_s=5, dimse_timeout_s=10, on_answer=lambda _: None)
        assert [answer.status for answer in answers] == [0]
        (instance,) = peer.get("/instances")
        peer._read("/modalities/node/store", instance.encode())
    with site.receiver.ledger() as ledger:
        assert ledger.known(dataset.SOPInstanceUID) is not None


# --- keys, secrets, dates


def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path):
    """Group or world: the node does not start; nor with a password file like that."""
    made = Authority(tmp_path).issue("node")
    settings = Tls(port=2762, certificate=made.certificate, key=made.key, require_client_certificate=False)
    for mode in (0o640, 0o604, 0o620):
        made.key.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode 0{mode:o}.*chmod 600"):
            tls.require_usable(settings, [])
    made.key.chmod(0o400)
    tls.require_usable(settings, [])
    password = tmp_path / "password"
    password.write_text("x")
    password.chmod(0o644)
    with pytest.raises(ConfigError, match=r"key_password_file.*chmod 600"):
        tls.require_usable(settings.model_copy(update={"key_password_file": password}), [])


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_missing_or_wrong_password_is_said_and_never_shown_or_asked_for(tmp_path: Path, password: str | None):
    """OpenSSL must not ask on the terminal of a service; no message holds the secret."""
    made = Authority(tmp_path).issue("node", password="correct horse")
    secret = None
    if password is not None:
        secret = tmp_path / "password"
        secret.touch(mode=0o600)
        secret.write_text(password)
    with pytest.raises(ConfigError, match="key_password_file") as refused:
        tls.require_usable(Tls(certificate=made.certificate, key=made.key, key_password_file=secret), [])
    assert "wrong\n" not in str(refused.value) and "correct horse" not in str(refused.value)


def test_a_key_of_another_certificate_and_files_that_are_none_are_refused(tmp_path: Path):
    """Each with the file and the remedy."""
    authority = Authority(tmp_path)
    one, two = authority.issue("one"), authority.issue("two")
    for settings in (Tls(certificate=one.certificate, key=two.key), Tls(certificate=tmp_path / "none", key=one.key),
                     Tls(certificate=one.certificate, key=tmp_path / "none"),
                     Tls(port=2762, certificate=one.certificate, key=one.key, ca=one.key)):
        with pytest.raises(ConfigError, match="Remedy"):
            tls.require_usable(settings, [])


def test_no_secret_is_in_the_log_the_configuration_or_the_process_list(site: Site):
    """The password of the node's key is in its file alone."""
    assert site.receiver.process is not None
    process = Path(f"/proc/{site.receiver.process.pid}")
    seen = (site.receiver.log().encode() + site.receiver.config_path.read_bytes() + (process / "cmdline").read_bytes()
            + (process / "environ").read_bytes() + repr(site.receiver.config).encode())
    assert b"correct horse" not in seen


@pytest.mark.parametrize(("content", "mode", "why"), [
    (b"", 0o600, "is empty"), (b"\xff\xfesesame", 0o600, "is not text"), (b"sesame", 0o644, "has mode 0644"),
    (None, 0, "cannot be read")])
def test_a_secret_file_that_cannot_be_used_is_named_with_the_remedy(
        tmp_path: Path, content: bytes | None, mode: int, why: str):
    """Missing, empty, binary, or open to others; its content is never told."""
    path = tmp_path / "token"
    if content is not None:
        path.touch(mode)
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=f"stow_token_file.*{why}.*Remedy") as refused:
        read_secret(path, what="stow_token_file")
    assert "sesame" not in str(refused.value)
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text("sesame\r\n")
    assert read_secret(path, what="stow_token_file") == "sesame"


def test_days_left_count_to_the_first_certificate_that_ends(tmp_path: Path):
    """A file may hold a chain; what is over counts below zero."""
    authority = Authority(tmp_path)
    long, short, over = authority.issue("l", days=300), authority.issue("s", days=10), authority.issue("o", days=-3)
    both = tmp_path / "chain.pem"
    both.write_bytes(long.certificate.read_bytes() + short.certificate.read_bytes())
    now = NOW.timestamp()
    assert tls.certificate_days_left(long.certificate, now=now) == pytest.approx(300, abs=0.01)
    assert tls.certificate_days_left(both, now=now) == pytest.approx(10, abs=0.01)
    assert tls.certificate_days_left(over.certificate, now=now) == pytest.approx(-3, abs=0.01)
    with pytest.raises(ConfigError, match="no PEM certificate"):
        tls.certificate_days_left(long.key, now=now)


@pytest.mark.parametrize(("text", "why"), [
    ('[[peer]]\nname = "p"\nae_title = "P"\nhost = "h"\ntls = true', "tls_ca or certificate_sha256"),
    (f'[[peer]]\nname = "p"\nae_title = "P"\nhost = "h"\ncertificate_sha256 = ["{"0" * 64}"]', "needs tls = true"),
    ('[[peer]]\nname = "p"\nae_title = "P"\nhost = "h"\nstow_url = "https://me:secret@pacs/rs"', "stow_token_file"),
    ('[tls]\nport = 11112\ncertificate = "c"\nkey = "k"\nca = "a"', "a port of its own"),
])
def test_settings_that_protect_less_than_they_seem_to_are_refused(text: str, why: str):
    """A pin on a peer that may come plain, TLS towards nobody in particular."""
    with pytest.raises(ConfigError, match=why):
        parse(text)


def test_the_ten_lines_of_the_manual_make_what_the_node_takes(tmp_path: Path):
    """docs/security.md: its commands run, its configuration is valid, its files fit together; the pin is right."""
    page = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    commands = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)[0].replace("/etc/dicomnode", str(tmp_path))
    done = subprocess.run(["sh", "-e", "-c", commands], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    config = parse(re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)[0].replace("/etc/dicomnode", str(tmp_path)))
    tls.require_usable(config.tls, config.peer)
    pin = done.stdout.split()[-1]
    assert pin.lower() == Certificate(tmp_path / "pacs.crt", tmp_path / "pacs.key").sha256
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shown.load_cert_chain(tmp_path / "pacs.crt", tmp_path / "pacs.key")
    context = tls.client_context(config.tls, config.peer[0])
    client_in, client_out, server_in, server_out = (ssl.MemoryBIO() for _ in range(4))
    ends = (context.wrap_bio(client_in, client_out, server_hostname=config.peer[0].host),
            shown.wrap_bio(server_in, server_out, server_side=True))
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            server_in.write(client_out.read())
            client_in.write(server_out.read())
    assert ends[0].version() == "TLSv1.3"
