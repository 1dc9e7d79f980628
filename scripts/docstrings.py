"""Docstrings in the API pages as they are written: sentences as text, columns as columns, doctests as code.

A Griffe extension, named in mkdocs.yml: Markdown alone would join the columns and take `>>>` for a quotation.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

__all__ = ["AsWritten", "as_markdown"]

_CODE = re.compile(r"(`[^`]*`)")


def as_markdown(docstring: str) -> str:
    """Paragraph by paragraph: doctests become `pycon` blocks, indented or columned paragraphs `text` blocks."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if paragraph.lstrip().startswith(">>>"):
            parts.append(f"```pycon\n{inspect.cleandoc(paragraph)}\n```")
        elif re.search(r"\S {2,}\S|^ {2,}", paragraph, flags=re.MULTILINE):
            parts.append(f"```text\n{paragraph}\n```")
        else:
            parts.append("".join(piece if _CODE.fullmatch(piece) else re.sub(r"([*_<\[\]])", r"\\\1", piece)
                                 for piece in _CODE.split(paragraph)))
    return "\n\n".join(parts)


class AsWritten(griffe.Extension):
    """Applies `as_markdown` to every docstring that is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
