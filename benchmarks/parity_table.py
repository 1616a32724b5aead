"""Every family in every stock architecture, in every engine: one table of parity figures, or of reasons.

    python -m benchmarks.parity_table [--cases llama qwen2] [--engines transformers vLLM] [--vllm-python PYTHON]

Tiny random models of every family are split into random experts (S2A2E6) by ``convert``, written by ``export`` and
``export_gguf``, and compared by what these and ``moesaic verify --parity`` use: stock transformers in a fresh process
with our runtime; llama.cpp and vLLM with stock transformers on the same folder. Where an architecture can only approach
weights of 1 (see docs/targets.md), the experts are weighed by the softmax over the chosen instead, which it computes
exactly, or, if it has neither, by weights near 1. Results: ``docs/results/parity.json`` and ``parity.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import write_rows
from tests import tiny_models
from tests.evaluate.test_vllm import for_vllm
from tests.targets.test_matrix import CASES

from moesaic.anatomy import FAMILIES as ANATOMIES
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import MoesaicError
from moesaic.evaluate.llama_cpp import llama_cpp_parity, stock_logits
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.vllm import find_python, otherwise_in_vllm, vllm_parity
from moesaic.jobs.convert import convert
from moesaic.jobs.export import export
from moesaic.jobs.export_gguf import export_gguf
from moesaic.jobs.native import read_converted
from moesaic.targets import TARGETS
from moesaic.targets.base import TargetOptions

STOCK = [name for name, target in TARGETS.items() if target.stock]
ENGINES = ("transformers", "llama.cpp", "vLLM")
LAYOUT = "S2A2E6"
DTYPES = {"bfloat16": ", bf16", "float32": ", fp32"}
INTRODUCTION = f"""\
Tiny random models, {LAYOUT} random experts. Weights have the dtype of the row; computed in fp32. A cell is the
largest difference of logits (transformers: 256 tokens, against our runtime) or of log-probabilities (llama.cpp,
vLLM: 24 or 32 tokens, against transformers on the same folder). Beside it: how often the likeliest next token is the
same. [n] is the reason why there is no figure. ~ marks a target that only approaches weights of 1. Experts count with
weight 1 in glm4_moe and qwen2_moe, elsewhere with the softmax over the chosen."""
OTHERS = [name for name in tiny_models.TINY if name not in {family for family, _, _ in CASES.values()}]
ORDER = [case + dtype for dtype in DTYPES.values() for case in [*CASES, *OTHERS]]


def converted(case: str, work: Path, dtype: str) -> dict[str, Path]:
    """The split model in the moesaic architecture, once per way of weighing experts."""
    dense = work / "dense"
    for_vllm(case, dense, dtype=dtype) if case in CASES else tiny_models.build_tiny(case, dense, dtype=dtype)
    hierarchical = ANATOMIES[Checkpoint(dense).config["model_type"]].moe is not None
    settings = {"method": "random", "options": {"layout": LAYOUT}, "target": "moesaic", "hierarchical": hierarchical}
    made = convert(dense, work / "ones", settings=settings)
    softmax = {path: replace(plan, gate="softmax_topk") for path, plan in made.blueprint.sites.items()}
    (work / "plans").mkdir()
    Blueprint.save(replace(made.blueprint, sites=softmax), work / "plans")
    convert(dense, work / "softmax", target="moesaic", hierarchical=hierarchical, blueprint=work / "plans")
    return {"weights of 1": work / "ones", "softmax over the chosen": work / "softmax"}


def form_for(target: str, folders: dict[str, Path]) -> tuple[str, list[str]]:
    """How experts are weighed in this target, or why it cannot hold the model."""
    options = TargetOptions()
    reasons: dict[str, list[str]] = {}
    for form, folder in folders.items():
        split = read_converted(folder)[2]
        reasons[form] = TARGETS[target].reasons(split)
        if not reasons[form] and TARGETS[target].exact(split, options):
            return form, []
    first = "weights of 1"
    return first, reasons[first]


def in_engine(engine: str, folder: Path, made: dict[str, Any], python: Path | None) -> dict[str, Any]:
    """Parity figures of one folder in one engine, or the reason why there are none."""
    if engine == "transformers":
        return made["native_parity"]
    ids_NW = parity_ids(folder, tiny_models.VOCAB, 32)
    try:
        if engine == "llama.cpp":
            file = export_gguf(folder, folder.with_suffix(".gguf"), "f32", check=False).output
            return llama_cpp_parity(file, ids_NW, stock_logits(folder), candidates=tiny_models.VOCAB).to_dict()
        if reason := otherwise_in_vllm(Checkpoint(folder)):
            return {"refused": [reason]}
        return vllm_parity(folder, ids_NW, stock_logits(folder), python=python).to_dict()
    except MoesaicError as error:
        return {"refused": [str(error)]}


def measure(
    case: str, dtype: str, engines: list[str], python: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """One family in one dtype: target -> its form and every engine's figures, or the reasons why it does not fit."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folders = converted(case, Path(work), dtype)
        for target in STOCK:
            form, reasons = form_for(target, folders)
            if reasons:
                found[target] = {"refused": reasons}
                continue
            try:
                made = export(folders[form], Path(work) / target, target=target)
            except MoesaicError as error:
                found[target] = {"refused": [str(error)]}
                continue
            entry = {engine: in_engine(engine, made.output, made.results, python) for engine in engines}
            found[target] = {"form": form, **entry}
            say(f"{case}, {dtype}, as {target}: {json.dumps(found[target])}")
    return found


def cell(entry: dict[str, Any], engine: str, reasons: list[str]) -> str:
    """A figure, or the number of the reason why there is none."""
    figures = entry if "refused" in entry else entry.get(engine)
    if figures is None:
        return ""
    if "refused" in figures:
        text = "; ".join(figures["refused"])
        if text not in reasons:
            reasons.append(text)
        return f"[{reasons.index(text) + 1}]"
    mark = "~" if figures.get("exact") is False else ""
    return f"{mark}{figures['max_delta']:.1e}, {figures['top1']:.0%}"


def page(results: dict[str, Any], versions: dict[str, str]) -> str:
    """The results as Markdown."""
    reasons: list[str] = []
    lines = [
        "# Parity: families x targets x engines",
        "",
        "`python -m benchmarks.parity_table`; versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "Rows of fp32 were measured with transformers 5.23.0.",
        "Exceptions are ministral, seed_oss, helium, ernie4_5, glm and cwm.",
        "",
        INTRODUCTION,
    ]
    for engine in ENGINES:
        rows = []
        for case, targets in sorted(results.items(), key=lambda row: ORDER.index(row[0])):
            rows.append(f"| {case} | " + " | ".join(cell(targets[target], engine, reasons) for target in STOCK) + " |")
        lines += ["", f"## {engine}", "", f"| model | {' | '.join(STOCK)} |", "| --- |" + " --- |" * len(STOCK), *rows]
    lines += ["", "## Reasons", ""]
    lines += [f"{index}. {text}" for index, text in enumerate(reasons, start=1)]
    return "\n".join(lines) + "\n"


def _has(entry: dict[str, Any], engines: list[str]) -> bool:
    """Whether a saved entry has figures, or a reason, for these engines."""
    return "refused" in entry or all(engine in entry for engine in engines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *OTHERS], default=[*CASES, *OTHERS])
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DTYPES], help="of the weights")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["transformers", "llama.cpp"])
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=Path("docs/results/parity"), help="without suffix")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of other cases and engines")
    given = parser.parse_args()
    file = given.out.with_suffix(".json")
    saved: dict[str, Any] = json.loads(file.read_text()) if given.resume and file.exists() else {}
    results: dict[str, Any] = saved.get("results", {})
    versions = saved.get("versions", {}) | {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "xllamacpp": version("xllamacpp"),
    }
    python = find_python(given.vllm_python) if "vLLM" in given.engines else None
    for case, dtype in [(case, dtype) for dtype in given.dtypes for case in given.cases]:
        row = case + DTYPES[dtype]
        earlier = results.get(row, {})
        if given.resume and earlier and all(_has(entry, given.engines) for entry in earlier.values()):
            continue
        found = measure(case, dtype, given.engines, python, lambda text: print(text, flush=True))
        results[row] = {target: earlier.get(target, {}) | entry for target, entry in found.items()}
        write_rows(file, {"versions": versions, "results": results})
        given.out.with_suffix(".md").write_text(page(results, versions))


if __name__ == "__main__":
    main()
