"""What must be private is private: patient data, keys, tokens, addresses. And certificates are still valid."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from dicomnode import machine
from dicomnode.acceptance.finding import Finding
from dicomnode.config import Config
from dicomnode.errors import ConfigError
from dicomnode.notify import read_urls
from dicomnode.secretfiles import read_secret, require_private
from dicomnode.troubles import CERTIFICATE_LAST_DAYS, CERTIFICATE_WARN_DAYS

__all__ = ["certificates", "files"]


def files(config: Config) -> Iterator[Finding]:
    """Modes of the data directory and of every file that holds a secret, as the user that runs this sees them."""
    folder = config.node.data_dir
    if folder.is_dir():
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & 0o077:
            yield Finding("permissions", "problem", f"{folder} holds patient data and has mode {mode:04o}",
                          f"chmod 700 {folder}")
        owner = folder.stat().st_uid
        if os.geteuid() == 0 and owner != 0:
            yield Finding("permissions", "warning",
                          f"this runs as root, the node as user {owner}: what that user may read was not tried",
                          "run it as the node's user: sudo -u dicomnode dicomnode check")
    for name, read in _secrets(config).items():
        try:
            read()
        except ConfigError as error:
            yield Finding(name, "problem", str(error))
        else:
            yield Finding(name, "ok", "there, readable, private")


def _secrets(config: Config) -> dict[str, Callable[[], object]]:
    def private(path: Path, name: str) -> Callable[[], object]:
        return lambda: require_private(path, what=name)

    def secret(path: Path, name: str) -> Callable[[], object]:
        return lambda: read_secret(path, what=name)

    found: dict[str, Callable[[], object]] = {}
    if config.tls.key is not None:
        found["tls.key"] = private(config.tls.key, "tls.key")
    if config.tls.key_password_file is not None:
        found["tls.key_password_file"] = secret(config.tls.key_password_file, "tls.key_password_file")
    for peer in config.peer:
        if peer.stow_token_file is not None:
            name = f"stow_token_file of {peer.name}"
            found[name] = secret(peer.stow_token_file, name)
    urls_file = config.alerts.urls_file
    if urls_file is not None:
        found["alerts.urls_file"] = lambda: read_urls(urls_file)
    return found


def certificates(config: Config, *, now: float) -> Iterator[Finding]:
    """Every certificate file of the configuration: readable, and for how long it is valid."""
    for name, days in machine.certificate_days(config, now=now).items():
        if days is None:
            yield Finding(name, "problem", "cannot be read as PEM certificates", "name the right file")
        elif days < CERTIFICATE_LAST_DAYS:
            when = f"expires in {days:.0f} days" if days >= 0 else f"expired {-days:.0f} days ago"
            yield Finding(name, "problem", when, "renew the certificate")
        elif days < CERTIFICATE_WARN_DAYS:
            yield Finding(name, "warning", f"expires in {days:.0f} days", "renew the certificate")
        else:
            yield Finding(name, "ok", f"valid for {days:.0f} days")
    if config.tls.port is not None:
        from dicomnode.tls import ServerTls

        try:
            ServerTls(config.tls, config.peer)
        except ConfigError as error:
            yield Finding("tls", "problem", str(error))
        else:
            yield Finding("tls", "ok", f"certificate and key fit; port {config.tls.port}")
