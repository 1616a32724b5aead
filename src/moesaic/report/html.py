"""Pieces of HTML: text is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["definitions", "element", "escape", "note", "section", "table", "tile"]


def element(tag: str, content: str, **attributes: str | None) -> str:
    """``<tag ...>content</tag>``; content is HTML. ``class_`` and ``data_x`` become ``class`` and ``data-x``."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{shown}>{content}</{tag}>"


def section(name: str, title: str, *parts: str) -> str:
    """A section with a heading; "" where it has no content."""
    content = "\n".join(part for part in parts if part)
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{content}\n</section>' if content else ""


def note(text: str) -> str:
    """A paragraph that explains; what stands between backticks is code."""
    pieces = escape(text).split("`")
    shown = "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))
    return f'<p class="note">{shown}</p>' if text else ""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table that scrolls where it is too wide. The first ``text_columns`` are left-aligned."""
    sides = ["text" if place < text_columns else "number" for place in range(len(headers))]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells("th", headers)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, one line each; those without a value are left out."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows if value)
    return f"<dl>{lines}</dl>" if lines else ""


def tile(value: str, name: str, remark: str = "") -> str:
    """One figure that leads the page."""
    small = f"<small>{escape(remark)}</small>" if remark else ""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>{small}</div>'
