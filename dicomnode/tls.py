"""DICOM TLS, both ways: the BCP 195 profile of PS3.15 B.12, certificates of both sides, pins.

TLS 1.2 and 1.3 only, never lower whatever the other side asks for (non-downgrading); of TLS 1.2 the four cipher suites
that RFC 9325 section 4.2 recommends; no compression, no renegotiation, keys of at least 112 bits strength (RSA 2048).

Who the other side is, is settled in two steps. The handshake proves that the certificate is signed by an authority we
know. `Authorities.problem` then asks whether it is this peer's: its own authority (peer.tls_ca), its own certificate
(peer.certificate_sha256), and not one that is pinned to another peer.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dicomnode.errors import ConfigError
from dicomnode.logs import get_logger
from dicomnode.secretfiles import read_secret, require_private
from dicomnode.sections import Peer, Tls

__all__ = ["Authorities", "PeerContext", "ServerTls", "Session", "certificate_days_left", "certificate_files",
           "client_context", "fingerprint", "reason_of", "require_usable", "session_of"]

#: RFC 9325 section 4.2; those of TLS 1.3 are all three of RFC 8446 that OpenSSL offers.
TLS12_SUITES = ("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384",
                "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256")
log = get_logger("tls")


@dataclass(frozen=True)
class Session:
    """What the handshake of an accepted connection showed.

    certificate  SHA-256 of the peer's certificate in hex, "" where it showed none.
    chain        the same of every certificate above it, as verified.
    """

    version: str
    cipher: str
    certificate: str = ""
    chain: frozenset[str] = frozenset()


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate, as `openssl x509 -fingerprint -sha256` shows it without colons, in lower case."""
    return hashlib.sha256(der).hexdigest()


def session_of(connection: Any) -> Session | None:
    """The session of a connection after its handshake; None for a plain one."""
    if not isinstance(connection, ssl.SSLSocket):
        return None
    der = connection.getpeercert(binary_form=True)
    cipher = connection.cipher()
    return Session(connection.version() or "", cipher[0] if cipher else "", fingerprint(der) if der else "",
                   frozenset(fingerprint(each) for each in _verified_chain(connection)[1:]))


def _verified_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The certificates from the peer's to the authority's, DER; [] where none was verified."""
    inner = cast(Any, connection)._sslobj  # public as SSLSocket.get_verified_chain from Python 3.13 on
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_verified_chain() or []]


class Authorities:
    """Whose certificates each peer may show, read from the files that the configuration names.

    Raises ConfigError where a file holds no certificate.
    """

    def __init__(self, tls: Tls, peers: Sequence[Peer]) -> None:
        self.files = tuple(dict.fromkeys(path for path in (tls.ca, *(peer.tls_ca for peer in peers)) if path))
        known = {path: frozenset(map(fingerprint, _certificates(path, "the file of authorities")))
                 for path in self.files}
        self._common = known[tls.ca] if tls.ca else frozenset()
        self._own = {peer.name: known[peer.tls_ca] for peer in peers if peer.tls_ca}
        self._pinned = {pin.lower(): peer.name for peer in peers for pin in peer.certificate_sha256}

    def problem(self, peer: Peer, session: Session | None) -> str | None:
        """Why this connection is not that peer's; None where it may be."""
        if session is None:
            return "it came without TLS, and peer.tls asks for it" if peer.tls else None
        if not session.certificate:
            asked = peer.certificate_sha256 or peer.tls_ca
            return "it showed no certificate, and one of its own is configured" if asked else None
        if peer.certificate_sha256:
            pinned = session.certificate in {pin.lower() for pin in peer.certificate_sha256}
            return None if pinned else f"its certificate {session.certificate} is not in peer.certificate_sha256"
        owner = self._pinned.get(session.certificate)
        if owner is not None:
            return f"its certificate is that of peer {owner}"
        if not session.chain & self._own.get(peer.name, self._common):
            return "its certificate is signed by another authority than " + (
                "peer.tls_ca" if peer.tls_ca else "tls.ca")
        return None


class _Checked(ssl.SSLSocket):
    """A client's connection: the handshake ends well only with one of the certificates that are pinned."""

    def do_handshake(self, block: bool = False) -> None:
        context = cast(PeerContext, self.context)
        try:
            super().do_handshake(block)
        except OSError as error:
            context.failure = reason_of(error)
            raise
        shown = fingerprint(self.getpeercert(binary_form=True) or b"")
        if context.pins and shown not in context.pins:
            context.failure = f"its certificate {shown} is not in peer.certificate_sha256"
            raise ssl.SSLError(context.failure)


class PeerContext(ssl.SSLContext):
    """The context for one association that we open; `failure` says afterwards why the handshake failed."""

    sslsocket_class = _Checked
    pins: frozenset[str] = frozenset()
    failure: str = ""


def reason_of(error: OSError) -> str:
    """A failed handshake in words."""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "the TLS handshake took too long"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").replace("_", " ").lower()
        if reason in ("wrong version number", "http request", "record layer failure", "packet length too long"):
            return "it does not speak TLS there"
        return reason or str(error)
    return error.strerror or str(error)


def client_context(tls: Tls, peer: Peer) -> PeerContext:
    """For an association with a peer that has tls = true.

    Verified are the chain (peer.tls_ca, else tls.ca) and, unless certificates are pinned, the host name. Where nothing
    but pins is configured they alone decide: a self-signed certificate is then enough. Raises ConfigError.
    """
    context = PeerContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.pins = frozenset(pin.lower() for pin in peer.certificate_sha256)
    context.check_hostname = not context.pins
    authority = peer.tls_ca or tls.ca
    if authority is not None:
        _load_authorities(context, authority)
    elif context.pins:
        context.verify_mode = ssl.CERT_NONE
    else:
        raise ConfigError(f"peer {peer.name} has tls = true, and nothing says which certificate is its own. Remedy: "
                          "set tls.ca, peer.tls_ca or peer.certificate_sha256.")
    if tls.certificate is not None:
        _load_own(context, tls)
    return context


class ServerTls:
    """The contexts of the TLS port: made anew when one of the files changed, so that renewed certificates are used.

    Raises ConfigError where a file is missing, a key can be read by others, or key and certificate do not fit.
    """

    def __init__(self, tls: Tls, peers: Sequence[Peer]) -> None:
        self._tls, self._peers = tls, peers
        self._stamp = self._stamped()
        self._context, self.authorities = self._made()

    def context(self) -> ssl.SSLContext:
        """For the next connection. Files that became unusable leave the last good context in use."""
        stamp = self._stamped()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context, self.authorities = self._made()
                log.info("The certificates on disk changed and are used from now on.", action="tls_reloaded")
            except ConfigError as error:
                log.error(f"The changed certificates are not used: {error}", action="tls_reload_failed")
        return self._context

    def use(self, peers: Sequence[Peer]) -> None:
        """Other peers, for connections to come. Raises ConfigError, and the old ones stay."""
        before, self._peers = self._peers, peers
        try:
            self._context, self.authorities = self._made()
        except ConfigError:
            self._peers = before
            raise
        self._stamp = self._stamped()

    def _made(self) -> tuple[ssl.SSLContext, Authorities]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _harden(context)
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_SINGLE_ECDH_USE | ssl.OP_NO_TICKET
        context.num_tickets = 0  # no session is resumed: each handshake shows the certificate
        authorities = Authorities(self._tls, self._peers)
        for path in authorities.files:
            _load_authorities(context, path)
        if self._tls.require_client_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
        elif authorities.files:
            context.verify_mode = ssl.CERT_OPTIONAL
        _load_own(context, self._tls)
        return context, authorities

    def _stamped(self) -> tuple[object, ...]:
        paths = (self._tls.certificate, self._tls.key, self._tls.ca, *(peer.tls_ca for peer in self._peers))
        return tuple(_modified(path) for path in paths if path is not None)


def _modified(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(TLS12_SUITES) + ":@SECLEVEL=2")
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def _load_own(context: ssl.SSLContext, tls: Tls) -> None:
    """Our certificate and key. Raises ConfigError."""
    if tls.certificate is None or tls.key is None:
        raise ConfigError("tls.certificate and tls.key belong together. Remedy: set both.")
    require_private(tls.key, what="tls.key")
    secret = read_secret(tls.key_password_file, what="tls.key_password_file") if tls.key_password_file else ""
    password: Callable[[], str] = lambda: secret  # noqa: E731 - a function: OpenSSL asks the terminal otherwise
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=password)
    except ssl.SSLError as error:
        reason = (error.reason or "the password is missing or wrong").replace("_", " ").lower()
        raise ConfigError(
            f"tls.certificate {tls.certificate} and tls.key {tls.key} cannot be used: {reason}. Remedy: PEM files, the "
            "key of this very certificate, its password in tls.key_password_file.") from error
    except OSError as error:
        raise ConfigError(f"tls.certificate {tls.certificate} cannot be read: {error.strerror}. Remedy: check path and "
                          "owner.") from error


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    _certificates(path, "the file of authorities")
    context.load_verify_locations(path)


def _certificates(path: Path, what: str) -> list[bytes]:
    """The certificates in a PEM file, DER. Raises ConfigError where there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        return [each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(path.read_bytes())]
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}. Remedy: check path and owner.") from error
    except ValueError as error:
        raise ConfigError(f"{what} {path} holds no PEM certificate. Remedy: name the right file.") from error


def certificate_days_left(path: Path, *, now: float) -> float:
    """Days until the first certificate in a PEM file ends, negative once it has; `now` in seconds since 1970.

    Raises ConfigError where the file cannot be read.
    """
    from cryptography import x509

    ends = [x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()
            for der in _certificates(path, "the certificate")]
    return (min(ends) - now) / 86400


def require_usable(tls: Tls, peers: Sequence[Peer]) -> None:
    """Read every file that the configuration names. Raises ConfigError with the first that cannot be used."""
    if tls.port is not None:
        ServerTls(tls, peers)
    elif tls.certificate is not None:
        _load_own(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), tls)
    for peer in peers:
        if peer.tls:
            client_context(tls, peer)


def certificate_files(tls: Tls, peers: Sequence[Peer]) -> dict[str, Path]:
    """Every certificate file that the configuration names, by the key that names it."""
    named = {"tls.certificate": tls.certificate, "tls.ca": tls.ca,
             **{f"tls_ca of peer {peer.name}": peer.tls_ca for peer in peers}}
    return {name: path for name, path in named.items() if path is not None}
