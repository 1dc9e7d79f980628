"""NodeError and its family: what can go wrong, and the one place that translates it.

Each error knows the DICOM status it is answered with (PS3.4 Annex B.2.3, PS3.7 Annex C), the exit code of the command
line (0 done, 1 failed, 2 usage, 3 refused input, 4 peer unreachable) and the HTTP status of the REST API (RFC 9110).
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "CannotUnderstand",
    "ConfigError",
    "DataSetMismatch",
    "DiskFull",
    "Exit",
    "LedgerCorrupt",
    "NodeError",
    "NotAllowed",
    "NotFound",
    "NothingAccepted",
    "PeerRefused",
    "PeerUnreachable",
    "RefusedInput",
    "TooLarge",
    "TransitionRefused",
]


class Exit(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4


class NodeError(Exception):
    """Something the node cannot do; the message names what, why and the remedy."""

    status = 0x0110  # PS3.7 C.5.15: processing failure
    exit_code = Exit.FAILED
    http_status = 500


class ConfigError(NodeError):
    """The configuration is not usable; the message names file, key, reason and remedy."""

    exit_code = Exit.USAGE


class DiskFull(NodeError):
    """No room to keep the object; the sender may try again later."""

    status = 0xA700  # PS3.4 B.2.3: refused, out of resources
    http_status = 507


class TooLarge(NodeError):
    """The object is larger than the site allows (reception.max_object_mb)."""

    status = 0xA701  # PS3.4 B.2.3: refused, out of resources
    exit_code = Exit.REFUSED
    http_status = 413


class NotAllowed(NodeError):
    """This peer has no right to that service."""

    status = 0x0124  # PS3.7 Annex C: refused, not authorized
    exit_code = Exit.REFUSED
    http_status = 403


class DataSetMismatch(NodeError):
    """The data set contradicts the request that carried it (SOP Class or SOP Instance UID)."""

    status = 0xA900  # PS3.4 B.2.3: error, data set does not match SOP class
    exit_code = Exit.REFUSED
    http_status = 422


class CannotUnderstand(NodeError):
    """The data set cannot be read, or lacks what every object must carry."""

    status = 0xC000  # PS3.4 B.2.3: error, cannot understand
    exit_code = Exit.REFUSED
    http_status = 422


class RefusedInput(NodeError):
    """The input is readable but must not be processed."""

    exit_code = Exit.REFUSED
    http_status = 409


class NotFound(NodeError):
    """No study, series or job of that name is in the ledger."""

    exit_code = Exit.USAGE
    http_status = 404


class TransitionRefused(NodeError):
    """The ledger does not allow that change of state."""

    exit_code = Exit.FAILED
    http_status = 409


class LedgerCorrupt(NodeError):
    """The ledger file is damaged or of a version this software does not know."""

    http_status = 503


class PeerUnreachable(NodeError):
    """The peer does not answer, rejects the association or does not accept the objects."""

    exit_code = Exit.UNREACHABLE
    http_status = 504


class NothingAccepted(PeerUnreachable):
    """The peer answers, and accepts none of the presentation contexts proposed."""


class PeerRefused(NodeError):
    """The peer answers, and does not do what it was asked: a failed query or retrieval."""

    http_status = 502
