"""Does a bf16 checkpoint convert as well as its fp32 original? Every method on both, each verified and evaluated.

    python -m benchmarks.dtypes WORK FP32_MODEL [FP32_MODEL ...]

Each model is copied to bf16 in WORK. Every method converts both copies, `verify --baseline` judges the result, and
perplexity is measured beside the dense model of the same dtype. Results are appended to WORK/dtypes.jsonl as they
come; a run that is started again goes on. At the end it writes docs/results/dtypes.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.cast import cast_copy
from moesaic.errors import MoesaicError
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows
from moesaic.jobs.native import verify_native
from moesaic.jobs.verify import verify_output

WINDOW = 1024
DTYPES = ("float32", "bfloat16")
BOUND = 0.005
"""Largest difference of the ratios to dense that counts as equal, relative."""
TRAIN = {"steps": 8, "batch": 1, "held_out": 1, "eval_every": 8, "save_every": 8}
METHODS: dict[str, dict[str, Any]] = {
    "cmoe": {"method": "cmoe", "options": {"layout": "S3A3E8"}},
    "cmoe, glm4_moe": {"method": "cmoe", "options": {"layout": "S3A3E8"}, "router": "oracle"},
    "mlpmoe": {"method": "mlpmoe"},
    "mlpmoe, fade": {"method": "mlpmoe", "options": {"fade_max": 0.2}},
    "mlpmoe, keep 28": {"method": "mlpmoe", "options": {"keep": 28}},
    "moefication": {"method": "moefication", "options": {"layout": "S0A6E8"}},
    "llama_moe, scale": {"method": "llama_moe", "options": {"layout": "S0A6E8", "score_scale": 1.0}},
    "token clusters, union": {"method": "token_clusters", "options": {"split": "union", "active": 0.75}},
    "token clusters, copies": {"method": "token_clusters", "options": {"active": 0.75, "experts": 4}},
    "secret_moe": {"method": "secret_moe", "options": {"steps": 20, "batch": 256}},
    "tomoe": {"method": "tomoe", "options": {"active": 0.75, "counted": "ffn", "experts": 4, "train": TRAIN}},
    "static": {"method": "static", "options": {"active": 0.75}},
    "random": {"method": "random", "options": {"active": 0.75}},
}


def measure(folder: Path, ids_NW: torch.Tensor) -> Perplexity:
    """Perplexity in the folder's own dtype."""
    moesaic.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    found = perplexity(model, ids_NW, protocol_name("wikitext2-raw/test", WINDOW, len(ids_NW)))
    del model
    gc.collect()
    return found


def one(dense: Path, out: Path, case: dict[str, Any], tokens: int, ids_NW: torch.Tensor) -> dict[str, Any]:
    """Convert, verify and evaluate; the figures, or what was refused."""
    started = time.monotonic()
    try:
        calibration = {"tokens": tokens, "window": WINDOW}
        done = moesaic.convert(dense, out, calibration=calibration, restart=True, **case)
        verify_output(out, baseline=dense)
        if done.target != "moesaic":
            verify_native(out, dense)
        found = measure(out, ids_NW)
    except MoesaicError as error:
        return {"error": f"{error.message} ({error.hint})", "seconds": time.monotonic() - started}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {
        "target": done.target,
        "ppl": found.value,
        "window_nll": list(found.window_nll),
        "predicted": found.predicted,
        "name": found.name,
        "seconds": round(time.monotonic() - started, 1),
    }


def known(log: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Results so far, by model, case and dtype."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return {(line["model"], line["case"], line["dtype"]): line for line in lines}


def run(work: Path, models: list[Path], tokens: int, windows: int) -> None:
    """All that the log lacks."""
    log = work / "dtypes.jsonl"
    for model in models:
        folders = {dtype: cast_copy(model, work / f"{model.name}-{dtype}", dtype) for dtype in DTYPES}
        ids_NW = token_windows(AutoTokenizer.from_pretrained(model), evaluation_text(), WINDOW, windows)
        for case in ("dense", *METHODS):
            for dtype, dense in folders.items():
                if (model.name, case, dtype) in known(log):
                    continue
                if case == "dense":
                    found = measure(dense, ids_NW)
                    entry: dict[str, Any] = {"ppl": found.value, "window_nll": list(found.window_nll)}
                    entry |= {"predicted": found.predicted, "name": found.name}
                else:
                    entry = one(dense, work / "out", METHODS[case], tokens, ids_NW)
                line = {"model": model.name, "case": case, "dtype": dtype, "tokens": tokens, **entry}
                with log.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
                print(model.name, case, dtype, entry.get("ppl", entry.get("error")), flush=True)


def page(results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The table of all models, in Markdown."""
    rows = [
        "# bf16 beside fp32",
        "",
        "`python -m benchmarks.dtypes WORK MODEL...`: every method on one model stored in fp32 and in bf16.",
        "Each output passed `verify --baseline` (and `--parity` for glm4_moe) before it was evaluated.",
        "Ratios are perplexity over the dense model of the same dtype, computed in that dtype.",
        f"The last column is their relative difference; at most {BOUND:.1%} counts as equal.",
        "Calibration and training are short here: the ratios compare dtypes, not methods.",
    ]
    for model in dict.fromkeys(key[0] for key in results):
        dense = {dtype: results[model, "dense", dtype] for dtype in DTYPES}
        tokens = next(line["tokens"] for key, line in results.items() if key[0] == model)
        rows += ["", f"## {model}, {dense['float32']['name']}, {tokens} tokens of calibration", ""]
        rows += ["| method | architecture | fp32 | bf16 | difference |", "|---|---|---|---|---|"]
        for case in METHODS:
            lines = {dtype: results.get((model, case, dtype)) for dtype in DTYPES}
            if any(line is None for line in lines.values()):
                continue
            if errors := [f"{d}: {line['error']}" for d, line in lines.items() if line and "error" in line]:
                rows.append(f"| {case} | {'; '.join(errors)} | | | |")
                continue
            ratio = {d: compare(as_perplexity(lines[d]), as_perplexity(dense[d])).ratio for d in DTYPES}
            change = ratio["bfloat16"] / ratio["float32"] - 1
            target = (lines["bfloat16"] or {})["target"]
            rows.append(
                f"| {case} | {target} | {ratio['float32']:.4f} | {ratio['bfloat16']:.4f} | {change:+.2%}"
                f"{'' if abs(change) <= BOUND else ' (more)'} |"
            )
    return "\n".join(rows) + "\n"


def as_perplexity(line: Any) -> Perplexity:
    """A line of the log as what it was."""
    return Perplexity(line["name"], line["ppl"], line["predicted"], tuple(line["window_nll"]))


def main() -> None:
    """Read the arguments, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens to evaluate on")
    parser.add_argument("--page", type=Path, default=Path("docs/results/dtypes.md"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    run(given.work, given.models, given.tokens, given.windows)
    given.page.write_text(page(known(given.work / "dtypes.jsonl")), encoding="utf-8")


if __name__ == "__main__":
    main()
