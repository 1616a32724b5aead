"""What do llama.cpp's types cost a converted model, beside what they cost its dense model?

    python -m benchmarks.quantised NAME DENSE "token clusters=STOCK" ... [--windows 4] [--report docs/results/quantised]

Every folder is written as GGUF in each type by `export_gguf`, and llama.cpp computes its perplexity on WikiText-2, in
windows of 512 tokens. Reported are the size of the file, the perplexity, and its ratio to that of the same model in
f16. `to dense` is that ratio over the dense model's own: 1 means that the type costs both the same. Its interval is
Student's t over windows, paired. `--report` keeps one model's figures under NAME in REPORT.json, beside those of
others, and writes REPORT.md of all.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name
from benchmarks.rows import write_rows

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.durable import replace_text
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.llama_cpp_perplexity import LONGEST, llama_cpp_perplexity
from moesaic.evaluate.perplexity import Perplexity, protocol_name, token_windows
from moesaic.gguf import DTYPES
from moesaic.jobs.export_gguf import export_gguf

DENSE, BASE = "dense", "f16"
TYPES = (BASE, *DTYPES[3:])

INTRO = """# Quantised GGUF files, dense beside converted

`python -m benchmarks.quantised NAME DENSE NAME=FOLDER ... --report docs/results/quantised`

Perplexity is llama.cpp's own, of files that `moesaic export --to gguf --dtype TYPE` writes. `x f16` is the ratio to the
same model in f16. `to dense` is that ratio over the dense model's, with a 95 % interval over windows: below 1.03 the
type costs the converted model at most 3 % more. With few windows the interval is wide. Tensors that fell back have rows
that do not fill the type's blocks.
"""


def measure(models: dict[str, Path], types: tuple[str, ...], windows: int) -> list[dict[str, Any]]:
    """A row per type and model; the dense model comes first."""
    ids_NW = token_windows(load_tokenizer(models[DENSE]), evaluation_text(), LONGEST, windows)
    name = protocol_name("wikitext2-raw/test", LONGEST, windows)
    base: dict[str, Perplexity] = {}
    rows = []
    for dtype in types:
        lost: dict[str, Perplexity] = {}
        for model, folder in models.items():
            with tempfile.TemporaryDirectory() as work:
                written = export_gguf(folder, Path(work) / "model.gguf", dtype, check=False)
                found = llama_cpp_perplexity(written.output, ids_NW, name)
            base.setdefault(model, found)
            lost[model] = over(found, base[model])
            row = {"type": dtype, "model": model, "megabytes": round(written.nbytes / 1e6, 1)}
            row |= {"fell_back": len(written.fallbacks), "perplexity": round(found.value, 3)}
            row["times_f16"] = round(found.value / base[model].value, 4)
            ratio = compare(lost[model], lost[DENSE])
            row["to_dense"] = [round(figure, 4) for figure in (ratio.ratio, ratio.low or 0.0, ratio.high or math.inf)]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def over(found: Perplexity, base: Perplexity) -> Perplexity:
    """The perplexity of a type over that of f16, window by window."""
    more = (one - other for one, other in zip(found.window_nll, base.window_nll, strict=True))
    return replace(found, value=found.value / base.value, window_nll=tuple(more))


def markdown(models: dict[str, Any]) -> str:
    """The page of all models."""
    lines = [INTRO.strip()]
    for name, found in models.items():
        lines += ["", f"## {name}", "", ", ".join(f"{key} {value}" for key, value in found["conditions"].items()) + "."]
        lines += [
            "",
            "| type | model | MB | fell back | perplexity | x f16 | to dense |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            middle, low, high = row["to_dense"]
            ratio = "1" if row["model"] == DENSE else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
            cells = (row["type"], row["model"], f"{row['megabytes']:.0f}", row["fell_back"])
            lines.append(
                f"| {' | '.join(map(str, cells))} | {row['perplexity']:.2f} | {row['times_f16']:.3f} | {ratio} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the model, on the page")
    parser.add_argument("dense", type=Path)
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER of stock folders")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES), help="f16 is always first")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--report", type=Path, help="write REPORT.json and REPORT.md there")
    given = parser.parse_args()
    models = {DENSE: given.dense} | {
        name: Path(path) for name, _, path in (one.partition("=") for one in given.folders)
    }
    types = (BASE, *(dtype for dtype in given.types if dtype != BASE))
    conditions = {"cpu": cpu_name(), "xllamacpp": version("xllamacpp"), "windows": given.windows, "tokens": LONGEST}
    own = {given.name: {"conditions": conditions, "rows": measure(models, types, given.windows)}}
    if given.report is not None:
        file = given.report.with_suffix(".json")
        kept = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}) | own
        write_rows(file, kept)
        replace_text(given.report.with_suffix(".md"), markdown(kept))


if __name__ == "__main__":
    main()
