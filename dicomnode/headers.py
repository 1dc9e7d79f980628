"""Values out of headers that anybody may have sent: what cannot be read counts as absent, never as an exception.

pydicom converts a value when it is asked for, so a mutated element raises at the place that looks at it. Rules on
headers ask through these functions and then name the attribute they miss.
"""

from __future__ import annotations

import math
import struct

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as DicomSequence

__all__ = ["integer", "items", "number", "numbers", "private_number", "text", "values"]

# What pydicom raises for a value that is not what its VR promises.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    NotImplementedError,
    struct.error,
    BytesLengthException,
)


def _raw(header: Dataset, keyword: str) -> object:
    try:
        return header.get(keyword)
    except UNREADABLE:
        return None


def values(header: Dataset, keyword: str) -> tuple[str, ...]:
    """The values of one attribute as text, padding removed; () when absent, empty, binary or unreadable.

    >>> ds = Dataset(); ds.CorrectedImage = ["DECY", "ATTN "]
    >>> values(ds, "CorrectedImage")
    ('DECY', 'ATTN')
    """
    raw = _raw(header, keyword)
    if raw is None or isinstance(raw, bytes | DicomSequence | Dataset):
        return ()
    many = raw if isinstance(raw, MultiValue | list | tuple) else [raw]
    found = tuple(str(value).strip(" \0") for value in many)
    return found if any(found) else ()


def text(header: Dataset, keyword: str) -> str:
    """The first value of one attribute, or "" when there is none."""
    found = values(header, keyword)
    return found[0] if found else ""


def numbers(header: Dataset, keyword: str) -> tuple[float, ...]:
    """All values as finite floats; () when absent or when any of them is not a finite number."""
    try:
        found = tuple(float(value) for value in values(header, keyword))
    except ValueError:
        return ()
    return found if all(math.isfinite(value) for value in found) else ()


def number(header: Dataset, keyword: str) -> float | None:
    """The first value as a finite float, or None."""
    found = numbers(header, keyword)
    return found[0] if found else None


def integer(header: Dataset, keyword: str) -> int | None:
    """The first value as a whole number, or None."""
    found = number(header, keyword)
    return int(found) if found is not None and found == int(found) else None


def items(header: Dataset, keyword: str) -> tuple[Dataset, ...]:
    """The items of a sequence; () when absent, empty or not a sequence."""
    raw = _raw(header, keyword)
    return tuple(raw) if isinstance(raw, DicomSequence) else ()


def private_number(header: Dataset, group: int, creator: str, element: int) -> float | None:
    """A private element's first value as a finite float, found by its private creator; None without it.

    The VR may be UN where the sender did not know the element; its bytes are then read as text, as for DS.
    """
    try:
        raw = header.private_block(group, creator)[element].value
    except UNREADABLE:
        return None
    found = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
    try:
        value = float(found.split("\\")[0].strip(" \0"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
