"""UIDs of a derived series, computed from what decides its pixels: the same input and recipe give the same series.

A resend, retry or crash can repeat the work but never makes a second series, and one UID never means two images.
UIDs under 2.25 are those of a UUID (PS3.5 B.2), here of version 8 (RFC 9562: the maker's own bits).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from sop.derivation import GENERIC_ROOT, Derivation

__all__ = ["IMPLEMENTATION_CLASS_UID", "IMPLEMENTATION_VERSION_NAME", "derived_uids", "uid_from"]

_UID_LENGTH = 64  # PS3.5 9.1


def uid_from(root: str, *parts: str) -> str:
    """A UID under `root` that is a pure function of `parts`; at most 64 characters.

    >>> uid_from("2.25", "a") == uid_from("2.25", "a") != uid_from("2.25", "b")
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)  # lengths keep ("ab", "c") and ("a", "bc") apart
    number = int.from_bytes(digest.digest()[:16], "big")
    if root == GENERIC_ROOT:
        number = number & ~(0xF << 76) | (0x8 << 76)  # UUID version 8
        number = number & ~(0x3 << 62) | (0x2 << 62)  # UUID variant of RFC 9562
        return f"{root}.{number}"
    return f"{root}.{number % 10 ** (_UID_LENGTH - len(root) - 1)}"


IMPLEMENTATION_CLASS_UID = uid_from(GENERIC_ROOT, "dicomnode", "implementation class")
IMPLEMENTATION_VERSION_NAME = "DICOMNODE"


def derived_uids(source_sop_uids: Sequence[str], derivation: Derivation) -> tuple[str, list[str]]:
    """SeriesInstanceUID and the SOPInstanceUIDs of the two derived slices of each source slice, in the order given.

    source_sop_uids  one per source slice; the frames of a multi-frame source repeat the UID of their instance.

    The series UID does not depend on the order of the slices, and a slice keeps its UIDs wherever it stands.
    """
    if not source_sop_uids:
        raise ValueError("a derived series needs at least one source instance")
    series_key = "\n".join((*sorted(source_sop_uids), derivation.canonical()))
    series_uid = uid_from(derivation.uid_root, "series", series_key)
    seen: Counter[str] = Counter()
    sop_uids = []
    for source_uid in source_sop_uids:
        for half in ("lower", "upper"):
            parts = ("instance", series_uid, source_uid, str(seen[source_uid]), half)
            sop_uids.append(uid_from(derivation.uid_root, *parts))
        seen[source_uid] += 1
    return series_uid, sop_uids
