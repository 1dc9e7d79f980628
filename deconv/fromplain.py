"""Frozen settings dataclasses from plain JSON values: the way back from `finish.plain`.

    rebuilt(Settings, plain(settings)) == settings

What a configuration file, an order or the recipe of a derived series holds becomes the same settings again: lists
become tuples, dicts the dataclasses that the fields are declared as. Values of another kind than declared and unknown
names are refused with the name that is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["converted", "rebuilt"]


def rebuilt(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass `kind` from plain values. Raises ValueError: unknown or missing name, value of another kind."""
    known = {entry.name for entry in fields(kind)}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ValueError(f"{where or kind.__name__} has no {', '.join(map(repr, unknown))}; it has "
                         f"{', '.join(sorted(known))}")
    try:
        return kind(**converted(kind, values, where))
    except TypeError as error:
        raise ValueError(f"{where or kind.__name__}: {str(error).partition('() ')[2] or error}") from error


def converted(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values by name, each as the field of that name in `kind` is declared. Raises ValueError for another kind."""
    hints = get_type_hints(kind)
    return {name: _as(hints[name], value, f"{where}.{name}" if where else name) for name, value in values.items()}


def _as(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _as_one_of(get_args(kind), value, where)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{where} is one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")
    if origin is tuple:
        return _as_tuple(get_args(kind), value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return rebuilt(kind, value, where)
    elif kind in (NoneType, None):
        if value is None:
            return value
    elif kind in (float, int):  # numpy's numbers, too
        if isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError(f"{where} is {_name(kind)}, got {value!r}")


def _as_tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is a list, got {value!r}")
    if len(parts) == 2 and parts[1] is Ellipsis:
        parts = (parts[0],) * len(value)
    if len(parts) != len(value):
        raise ValueError(f"{where} is a list of {len(parts)}, got {len(value)}: {value!r}")
    return tuple(_as(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True)))


def _as_one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return _as(kind, value, where)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; or ".join(reasons))


def _name(kind: Any) -> str:
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", NoneType: "nothing"}
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")
