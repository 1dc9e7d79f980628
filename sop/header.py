"""Values out of a header as numbers or as the text that was written; a damaged one is refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from sop.errors import Refused

__all__ = [
    "decimal_string", "integer", "items", "numbers", "private_text", "put", "raw_elements", "strings",
    "text", "texts", "without_pixels",
]

PIXEL_GROUP = 0x7FE0

RESEND = "send the series again from the scanner or the PACS"


def text(header: Dataset, keyword: str) -> str:
    """The value as text, "" where absent or empty."""
    value = _value(header, keyword)
    return "" if value is None else str(value).strip()


def texts(header: Dataset, keyword: str) -> tuple[str, ...]:
    """All values of a multi-valued code string, in capitals; () where absent."""
    return tuple(str(value).strip().upper() for value in _values(header, keyword))


def items(header: Dataset, keyword: str) -> list[Dataset]:
    """Items of a sequence, [] where absent. Raises Refused "malformed"."""
    found = _values(header, keyword)
    if not all(isinstance(item, Dataset) for item in found):
        raise Refused("malformed", f"{keyword} is not a sequence", RESEND)
    return found


def private_text(header: Dataset, group: int, creator: str, element: int) -> str:
    """A private value as text, found by its creator in whatever block it was put; "" where absent."""
    try:
        value = header.private_block(group, creator)[element].value
    except MemoryError:
        raise
    except KeyError:
        return ""
    except Exception as error:  # see _value
        reason = f"the private block of {creator} cannot be read ({type(error).__name__})"
        raise Refused("malformed", reason, RESEND) from error
    # An unknown private element comes as bytes where the syntax names no VR.
    written = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    return written.strip("\0 ")


def strings(header: Dataset, keyword: str, count: int) -> list[str]:
    """`count` decimal strings as they were written. Raises Refused "malformed"."""
    numbers(header, keyword, count)
    return [str(getattr(item, "original_string", item)).strip() for item in _values(header, keyword)]


def numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    """`count` finite numbers. Raises Refused "malformed" where absent, too few, too many or not numbers."""
    values = _values(header, keyword)
    try:
        result = [float(item) for item in values]
    except (TypeError, ValueError) as error:
        raise Refused("malformed", f"{keyword} does not hold numbers", RESEND) from error
    if len(result) != count or not all(map(math.isfinite, result)):
        raise Refused("malformed", f"{keyword} should hold {count} number(s) and holds {len(result)}", RESEND)
    return result


def integer(header: Dataset, keyword: str, *, default: int | None = None) -> int:
    """A whole number. Raises Refused "malformed" where it is not one, or absent and without `default`."""
    if default is not None and not text(header, keyword):
        return default
    value = numbers(header, keyword, 1)[0]
    if value != int(value):
        raise Refused("malformed", f"{keyword} should be a whole number and is {value}", RESEND)
    return int(value)


def decimal_string(value: float) -> str:
    """The number as DS, at most 16 characters [PS3.5 6.2], with as many digits as fit.

    >>> decimal_string(-0.00012345678901234567)
    '-0.000123456789'
    """
    written = (f"{value:.{digits}{style}}" for style in "gfe" for digits in range(17, -1, -1))
    return min((text for text in written if len(text) <= 16), key=lambda text: (abs(float(text) - value), len(text)))


def raw_elements(data: Dataset) -> dict[BaseTag, DataElement | RawDataElement]:
    """Copies of all elements, unread ones still unread; setting an attribute changes an element, so copies matter.

    Raises Refused "malformed".
    """
    try:
        return {tag: copy.copy(data.get_item(tag)) for tag in data.keys()}  # noqa: SIM118 (iterating reads elements)
    except MemoryError:
        raise
    except Exception as error:  # see _value
        raise Refused("malformed", f"the data set cannot be read ({type(error).__name__})", RESEND) from error


def put(header: Dataset, **values: Any) -> None:
    """Set attributes without reading what stood there, which may be damaged."""
    for keyword, value in values.items():
        tag = Tag(keyword)
        header[tag] = DataElement(tag, dictionary_VR(tag), value)


def without_pixels(data: Dataset) -> Dataset:
    """A data set of the same elements, still as they came, up to the pixel data; setting one leaves `data` alone.

    What follows pixel data is signatures and padding, which belong to this very instance.
    """
    header = Dataset({tag: element for tag, element in raw_elements(data).items() if tag.group < PIXEL_GROUP})
    if getattr(data, "file_meta", None) is not None:
        header.file_meta = data.file_meta
    return header


def _values(header: Dataset, keyword: str) -> list[Any]:
    value = _value(header, keyword)
    if value is None:
        return []
    return list(value) if isinstance(value, (MultiValue, Sequence, list, tuple)) else [value]


def _value(header: Dataset, keyword: str) -> object:
    try:
        return header.get(keyword)
    except MemoryError:
        raise
    except Exception as error:  # a value its VR does not allow makes the parser raise nearly anything
        raise Refused("malformed", f"{keyword} cannot be read ({type(error).__name__})", RESEND) from error
