"""Pieces of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def figure(svg: str, caption: str, wide: bool = False) -> str:
    return f"<figure{' class=wide' if wide else ''}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def grid(
    headings: Sequence[str], rows: Sequence[Sequence[str]], words: int, marks: Sequence[str] = (), dense: bool = False
) -> str:
    """A table. `words`: columns that hold words, the first ones. `marks`: classes of the rows."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=word' if i < words else ''}>{escape(value)}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(
        f"<tr{f' class={marks[i]}' if marks and marks[i] else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)
    )
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    return f'<div class="scroll"><table{" class=dense" if dense else ""}>{head}<tbody>{body}</tbody></table></div>'
