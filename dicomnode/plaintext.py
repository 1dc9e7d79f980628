"""Text that came from elsewhere (DICOM values, words of peers) as it may be shown: no sign that cannot be seen.

Control characters and those that turn the direction of writing (Unicode TR9) can make a line read as something that it
is not: "held" could stand where "delivered" is written. They are shown as the replacement character.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = ["seen"]

Value = TypeVar("Value")
_KEPT = "\t\n\r"
_UNSEEN = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),
           0xFEFF]
_TABLE = dict.fromkeys((code for code in _UNSEEN if chr(code) not in _KEPT), "\ufffd")


def seen(value: Value) -> Value:
    """A text without such signs, its type kept (markupsafe.Markup stays so); what is no text as it is.

    >>> seen("PET\\u202eTEP\\x1b"), seen(3)
    ('PET\ufffdTEP\ufffd', 3)
    """
    return value.translate(_TABLE) if isinstance(value, str) else value  # type: ignore[return-value]
