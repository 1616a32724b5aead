"""The sweep's findings as one HTML file that needs nothing else. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td:first-child, th:first-child { text-align: left; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
"""
_STUDENT_HEADERS = (
    "student",
    "h_s + k w",
    "active neurons",
    "FVU",
    "gain at equal FVU",
    "router MACs",
    "all MACs",
    "parameters",
    "FVU / dense at equal MACs",
    "rate",
)


def page(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The page: settings, figures, a table of students per law, baselines, dictionary fits."""
    data = results["data"]
    title = f"Secret experts in layer {results['layer']} of {results['model']}"
    left_out = f"{data['left_out']} tokens left out as too long, {data['left_out_energy']:.1%} of the output energy"
    tokens = ", ".join(f"{count} {split}" for split, count in data["tokens"].items())
    parts = [
        f"<p>Width {results['d_model']}, {results['d_ff']} neurons. Tokens: {tokens}; {left_out}. "
        f"{results['config']['epochs']} epochs of batches of {results['config']['batch']}. Rates are chosen on the "
        "validation split, FVU is the test split's. Gain: width of the dense student of equal FVU over active neurons "
        "(-: outside the dense curve). Equal MACs count the router; below 1 the mixture is better.</p>"
    ]
    parts += [f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in figures.items()]
    for law in dict.fromkeys(row["law"] for row in results["students"]):
        parts.append(f"<h2>Students, {'real inputs' if law == 'real' else 'Gaussian twin'}</h2>")
        parts.append(_table(_STUDENT_HEADERS, student_cells(results["students"], law)))
        parts.append("<h3>Without training</h3>")
        parts.append(_baselines(results["baselines"][law]))
    if results["probe"]:
        parts.append("<h2>Dictionary of the inputs</h2>")
        rows = [
            (row["law"], str(row["atoms"]), str(row["top_k"]), _number(row["fvu"]), _number(_floor(results, row)))
            for row in results["probe"]
        ]
        parts.append(_table(("inputs", "atoms", "active", "FVU", "FVU of as many principal directions"), rows))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def student_cells(rows: Sequence[Mapping[str, Any]], law: str) -> list[tuple[str, ...]]:
    """The students of a law as table cells, dense ones first, under the headers of the page."""
    mine = [row for row in rows if row["law"] == law]
    mine.sort(key=lambda row: (row["spec"]["experts"], row["spec"]["router"], row["spec"]["init"], row["active"]))
    cells = []
    for row in mine:
        equal = row.get("equal_macs")
        cells.append(
            (
                row["family"],
                row["split"],
                str(row["active"]),
                _number(row["fvu"]),
                f"{row['gain']:.2f}" if row.get("gain") else "-",
                f"{row['router_macs']:,}",
                f"{row['macs']:,}",
                f"{row['parameters']:,}",
                f"{equal['ratio']:.2f}" if equal else "-",
                f"{row['rate']:g}",
            )
        )
    return cells


def _floor(results: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    return results["baselines"][row["law"]]["input_pca_floor"].get(str(row["top_k"]))


def _baselines(found: Mapping[str, Any]) -> str:
    widths = list(dict.fromkeys([*found["pca_floor"], *found["top_k_oracle"]]))
    rows = [
        (width, *(_number(found[name].get(width)) for name in ("reduced_rank", "pca_floor", "top_k_oracle")))
        for width in widths
    ]
    affine = f"<p>Best affine map: FVU {_number(found['affine']['fvu'])}.</p>"
    return affine + _table(("width", "affine map of that rank", "PCA floor", "top-k oracle of the teacher"), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
