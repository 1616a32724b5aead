"""The page of `ffn.py`: what was aimed at, and a table for each shape and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.ffn_forms import ALL_ROWS, DENSE, TOMOE

Row = dict[str, Any]
INTRO = """# One FFN beside torch and transformers

`make bench`, that is `python -m benchmarks.ffn`. {conditions}.

Figures say how many times as fast as torch's dense FFN: the ratio of the minima / the median of the ratios within a
round, and the path that the runtime chose. Above 1 is faster than dense. Contenders take turns, and weights come from
memory, not from a cache. Weights are random, and so are the members of unions: 8 experts of ToMoE, 128 of token
clusters. transformers' experts are those of CMoE's layout. Neuron experts are measured with one token, as they are for
decoding.

*Limits* say what a form could reach. The first counts the weights that any of the tokens wants, the second the
arithmetic. Few tokens are bound by the first, many by the second. torch does not read weights as fast as the memory
gives them, so a ratio may exceed its limit. Of neuron experts the router's weights count too.
"""
Aim = Callable[[Row, str], tuple[float, float] | None]


def markdown(rows: list[Row], conditions: dict[str, Any]) -> str:
    """The whole page."""
    said = ", ".join(f"{key} {value}" for key, value in conditions.items())
    tables = [
        _table([row for row in rows if (row["shape"], row["dtype"]) == key])
        for key in dict.fromkeys((row["shape"], row["dtype"]) for row in rows)
    ]
    return "\n\n".join([INTRO.format(conditions=said).strip(), _aims(rows), *tables])


def _table(rows: list[Row]) -> str:
    """One shape and dtype, a column per number of tokens."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    names = dict.fromkeys(name for row in rows for name in row["times_dense"])
    dense = ["torch dense, us", *("{:.0f} / {:.0f}".format(*row["micros"][DENSE]) for row in rows)]
    cells = [["tokens", *(str(row["tokens"]) for row in rows)], ["---"] * (len(rows) + 1), dense]
    for name in names:
        cells.append([name, *(_cell(row, name) for row in rows)])
        if any(name in row["limits"] for row in rows):
            cells.append(["*limits*", *(_limit(row, name) for row in rows)])
    cells.append(["rounds", *(str(row["rounds"]) for row in rows)])
    heading = f"## {rows[0]['shape']}, {rows[0]['dtype']}\n\n"
    return heading + "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(row: Row, name: str) -> str:
    if name not in row["times_dense"]:
        return "-"
    least, middle = row["times_dense"][name]
    bold = "**" if name in row["path"] else ""
    return f"{least:.2f} / {bold}{middle:.2f}{bold} {row['path'].get(name, '')}".strip()


def _limit(row: Row, name: str) -> str:
    return f"*{', '.join(f'{limit:.2f}' for limit in row['limits'][name])}*" if name in row["limits"] else "-"


def _times(row: Row, name: str) -> float:
    return row["times_dense"][name][1]


def _one_beside_dense(row: Row, name: str) -> tuple[float, float] | None:
    if row["tokens"] == 1 and row["dtype"] == "bfloat16":
        return _times(row, name), 1.5 * row["limits"][name][0]
    return None


def _one_beside_kernel(row: Row, name: str) -> tuple[float, float] | None:
    if row["tokens"] == 1 and ALL_ROWS in row["micros"]:
        return row["micros"][ALL_ROWS][1] / row["micros"][name][1], 0.85 * row["limits"][name][0]
    return None


def _some(row: Row, name: str) -> tuple[float, float] | None:
    return (_times(row, name), 1.0) if 2 <= row["tokens"] <= 64 else None


def _many(row: Row, name: str) -> tuple[float, float] | None:
    if row["tokens"] >= 512 and "union" not in name:
        return _times(row, name), 0.85 * row["limits"][name][1]
    return None


def _many_of_union(row: Row, name: str) -> tuple[float, float] | None:
    return (
        (_times(row, name), 1.2) if row["tokens"] == 4096 and (name == TOMOE or name.endswith("union 50 %")) else None
    )


AIMS: dict[str, Aim] = {
    "one token, bf16: 1.5/p times torch dense": _one_beside_dense,
    "one token: 0.85/p times our kernel with all rows": _one_beside_kernel,
    "2 to 64 tokens: not below torch dense": _some,
    "512 tokens and more, packed experts: 0.85/p times torch dense": _many,
    "4096 tokens, unions of 50 %: 1.2 times torch dense": _many_of_union,
}
"""By medians; p is the inverse of the limit that counts there."""


def _aims(rows: list[Row]) -> str:
    """How many rows reach each aim, and which is the furthest from it."""
    lines = [
        "| aim, by medians; 1/p is the form's limit | reached | furthest from it: measured, aim |",
        "|---|---|---|",
    ]
    for text, aim in AIMS.items():
        found = [
            (*pair, f"{row['shape']} {row['dtype']}, {row['tokens']} tokens, {name}")
            for row in rows
            for name in row["path"]
            if (pair := aim(row, name)) is not None
        ]
        if not found:
            lines.append(f"| {text} | not measured | |")
            continue
        worst = min(found, key=lambda one: one[0] / one[1])
        reached = sum(measured >= wanted for measured, wanted, _ in found)
        lines.append(f"| {text} | {reached} of {len(found)} | {worst[0]:.2f}, {worst[1]:.2f}: {worst[2]} |")
    return "\n".join(lines)
