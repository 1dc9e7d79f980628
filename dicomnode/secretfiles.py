"""Secrets lie in files that their owner alone may read; the configuration names the file, never the secret."""

from __future__ import annotations

import stat
from pathlib import Path

from dicomnode.errors import ConfigError

__all__ = ["read_secret", "require_private"]

_LIMIT = 64 * 1024  # bytes; no secret is longer, and a wrong path must not be read without end


def require_private(path: Path, *, what: str) -> None:
    """Raises ConfigError where group or others may touch the file, naming `what` it is and the remedy."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}. Remedy: check path and owner.") from error
    if mode & 0o077:
        raise ConfigError(f"{what} {path} has mode {mode:04o}: others than its owner may use it. "
                          f"Remedy: chmod 600 {path}, owned by the node's user.")


def read_secret(path: Path, *, what: str) -> str:
    """The text of a secret file, without the line end. Raises ConfigError; the secret is in no message."""
    require_private(path, what=what)
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT).decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}. Remedy: check path and owner.") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} is not text. Remedy: write it as UTF-8.") from None
    if not text:
        raise ConfigError(f"{what} {path} is empty. Remedy: write the secret into it.")
    return text
