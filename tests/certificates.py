"""An authority of our own for tests, and what it signs: PEM files made in a folder that the test gives."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from dicomnode.tls import fingerprint

NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key (mode 0600)."""

    certificate: Path
    key: Path

    @property
    def sha256(self) -> str:
        return fingerprint(x509.load_pem_x509_certificate(self.certificate.read_bytes()).public_bytes(
            serialization.Encoding.DER))


class Authority:
    """Signs certificates with an EC key; `path` is its own certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder, self.name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = _builder(name, name, days=3650).public_key(self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(self._key, hashes.SHA256())
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, address: str | None = "127.0.0.1", days: float = 365, use_rsa: bool = False,
              password: str | None = None) -> Certificate:
        """A certificate for `address` (None: for no address), valid for `days` from yesterday on."""
        key = rsa.generate_private_key(65537, 2048) if use_rsa else ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, self.name, days=days).public_key(key.public_key())
        if address is not None:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        made = Certificate(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        made.certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        made.key.touch(mode=0o600)
        made.key.write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()))
        return made


def _builder(subject: str, issuer: str, *, days: float) -> x509.CertificateBuilder:
    return (x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(days=max(1.0, 1 - days)))
            .not_valid_after(NOW + datetime.timedelta(days=days)))
