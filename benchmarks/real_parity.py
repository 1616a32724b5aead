"""Do converted real models compute the same in stock engines? Parity on real text, fp32.

    python -m benchmarks.real_parity DENSE FOLDER... [--engines transformers llama.cpp vLLM] [--windows 16]

Each FOLDER is a stock folder that moesaic made from DENSE. The reference is our runtime under the folder's blueprint;
engines are stock transformers in a fresh process without moesaic, llama.cpp on an f32 GGUF (FOLDER-f32.gguf beside the
folder, written if it is missing) and vLLM. Results are merged into ``docs/results/parity_real.json`` and ``.md``.

Routers round differently in every engine: a token whose k-th and k+1-th scores are equal to within rounding may take
the other expert. So every comparison is also made without the tokens that come after such a near tie in their window,
and, for transformers, with our routers forced to the choices of stock transformers.

Axes: N windows, W tokens.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import write_rows
from torch import Tensor

from moesaic.evaluate.differences import Differences, before_any
from moesaic.evaluate.llama_cpp import llama_cpp_differences
from moesaic.evaluate.native_parity import compare_with_stock, parity_ids
from moesaic.evaluate.runtime import Runtime
from moesaic.evaluate.vllm import find_python, vllm_differences, vllm_version
from moesaic.jobs.export_gguf import export_gguf
from moesaic.jobs.native import blueprint_model, read_stock, target_of, target_runtime

NEAR_TIES = (1e-6, 1e-5, 1e-4)
"""Margins, in standard deviations of the scores, up to which a choice counts as a near tie."""
ENGINES = ("transformers", "llama.cpp", "vLLM")
INTRODUCTION = """\
`python -m benchmarks.real_parity DENSE FOLDER...`: WikiText-2 test, fp32, our runtime against the engine. transformers:
logits over the vocabulary, in a fresh process without moesaic; llama.cpp: log-probabilities of its 100 likeliest
tokens, f32 attention cache; vLLM: log-probabilities over the vocabulary. Bounds to meet: max 1e-3, top-1 99.9 %.

Max: largest difference. Rerouted: tokens of which some router chose other experts than ours. Near tie: the last chosen
expert's score is within 1e-5 standard deviations of the next one's; in brackets, the tokens before any in their
window. Forced: our routers choose what stock transformers chose, in the windows with rerouted tokens."""


class Margins:
    """The runtime as reference, keeping each window's distances from ties."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.margins: list[Tensor] = []

    def __call__(self, ids_W: Tensor) -> Tensor:
        logits_WV = self.runtime(ids_W)
        self.margins.append(self.runtime.margin_W)
        return logits_WV


def figures(differences: Differences, margin_NW: Tensor) -> dict[str, Any]:
    """All tokens, and those before any near tie in their window."""
    found: dict[str, Any] = {"all": differences.figures().to_dict(), "before_near_ties": {}}
    for bound in NEAR_TIES:
        keep_NW = before_any(margin_NW < bound)
        entry = differences.figures(keep_NW).to_dict() if keep_NW.any() else None
        found["before_near_ties"][f"{bound:g}"] = entry
    return found


def in_transformers(folder: Path, runtime: Runtime, ids_NW: Tensor) -> dict[str, Any]:
    """Stock transformers in a fresh process; if it chose other experts, also with these forced upon our runtime."""
    found = compare_with_stock(folder, ids_NW, runtime)
    assert found.rerouted_NW is not None
    assert found.margin_NW is not None
    result = figures(found.differences, found.margin_NW)
    first_NW = found.rerouted_NW & before_any(found.rerouted_NW.roll(1, 1).index_fill(1, torch.tensor([0]), False))
    result |= {
        "rerouted": int(found.rerouted_NW.sum()),
        "largest_margin_of_a_first_rerouting": found.margin_NW[first_NW].max().item() if first_NW.any() else None,
    }
    if found.rerouted_NW.any():
        result["before_rerouted"] = found.differences.figures(before_any(found.rerouted_NW)).to_dict()
        delta, tie, _ = found.forced
        result["forced"] = {"max_delta": delta, "tie": tie}
    return result


def in_llama_cpp(folder: Path, runtime: Runtime, ids_NW: Tensor, threads: int) -> dict[str, Any]:
    """llama.cpp on the f32 GGUF of the folder."""
    gguf = folder.with_name(f"{folder.name}-f32.gguf")
    if not gguf.exists():
        export_gguf(folder, gguf, "f32", check=False)
    reference = Margins(runtime)
    found = llama_cpp_differences(gguf, ids_NW, reference, candidates=100, threads=threads)
    return figures(found, torch.stack(reference.margins)) | {"version": version("xllamacpp")}


def in_vllm(folder: Path, runtime: Runtime, ids_NW: Tensor, python: Path | None) -> dict[str, Any]:
    """vLLM, in the virtual environment that has it."""
    reference = Margins(runtime)
    interpreter = find_python(python)
    found = vllm_differences(folder, ids_NW, reference, python=interpreter)
    made = figures(found, torch.stack(reference.margins))
    return made | ({"version": vllm_version(interpreter)} if interpreter else {})


def compare(dense: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All engines that were asked for, on one folder."""
    output, source, blueprint = read_stock(folder, dense)
    ids_NW = parity_ids(folder, int(output.config["vocab_size"]), given.window, given.windows)
    split, target, options = target_of(output, source, blueprint)
    runtime = target_runtime(blueprint_model(source, split.anatomy, blueprint), source, split, target, options)
    entry: dict[str, Any] = {}
    for engine in given.engines:
        if engine == "transformers":
            entry[engine] = in_transformers(folder, runtime, ids_NW) | {"version": version("transformers")}
        elif engine == "llama.cpp":
            entry[engine] = in_llama_cpp(folder, runtime, ids_NW, given.threads)
        else:
            entry[engine] = in_vllm(folder, runtime, ids_NW, given.vllm_python)
        entry[engine]["windows"] = list(ids_NW.shape)
        print(folder.name, engine, json.dumps(entry[engine]), flush=True)
    return entry


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Parity of real models on real text",
        "",
        INTRODUCTION,
        "",
        "| model | engine | tokens | max | median | top-1 | mean KL | rerouted | max before near ties | max forced |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, engines in sorted(results.items()):
        for engine, entry in engines.items():
            whole, near = entry["all"], entry["before_near_ties"]["1e-05"]
            kept = f"{near['max_delta']:.1e} ({near['tokens']})" if near else "-"
            forced = f"{entry['forced']['max_delta']:.1e}" if "forced" in entry else "-"
            lines.append(
                f"| {name} | {engine} {entry.get('version', '')} | {whole['tokens']} | {whole['max_delta']:.1e} | "
                f"{whole['median']:.1e} | {whole['top1']:.2%} | {whole['mean_kl']:.1e} | "
                f"{entry.get('rerouted', '-')} | {kept} | {forced} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["transformers", "llama.cpp"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=Path("docs/results/parity_real"), help="without suffix")
    given = parser.parse_args()
    for folder in given.folders:
        entry = compare(given.dense, folder, given)
        file = given.out.with_suffix(".json")
        results = json.loads(file.read_text()) if file.exists() else {}
        results[folder.name] = results.get(folder.name, {}) | entry
        write_rows(file, results)
        given.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
