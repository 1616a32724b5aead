"""Does a bf16 checkpoint convert as well as its fp32 original? Every method on both, each verified and evaluated.

    python -m benchmarks.dtypes WORK FP32_MODEL [FP32_MODEL ...]

Each model is copied to both dtypes in WORK. Every method converts both copies, `verify --baseline` judges the result,
and perplexity is measured beside the dense model of the same dtype. Some methods choose other neurons where weights
differ in the ninth bit, so the fp32 copy's decisions are applied to the bf16 copy as well (`--blueprint`). Results are
appended to WORK/dtypes.jsonl as they come; a run that is started again goes on. It writes docs/results/dtypes.json and
dtypes.md.
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
from benchmarks.rows import write_rows
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
DTYPES = ("bfloat16", "float32")
SAME = "bfloat16, decisions of float32"
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


def one(
    dense: Path, out: Path, case: dict[str, Any], tokens: int, ids_NW: torch.Tensor, keep: Path | None = None
) -> dict[str, Any]:
    """Convert, verify and evaluate; the figures, or what was refused. ``keep``: where the blueprint is copied."""
    started = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    try:
        calibration = {"tokens": tokens, "window": WINDOW}
        done = moesaic.convert(dense, out, calibration=calibration, restart=True, **case)
        if keep is not None:
            done.blueprint.save(keep)
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
        plans = {case: work / "blueprints" / model.name / case for case in METHODS}
        steps = [(dtype, case) for dtype in DTYPES for case in ("dense", *METHODS)]
        for dtype, case in [*steps, *((SAME, case) for case in METHODS)]:
            if (model.name, case, dtype) in known(log):
                continue
            dense = folders.get(dtype, folders["bfloat16"])
            if case == "dense":
                found = measure(dense, ids_NW)
                entry: dict[str, Any] = {"ppl": found.value, "window_nll": list(found.window_nll)}
                entry |= {"predicted": found.predicted, "name": found.name}
            elif dtype == SAME:
                given = {key: value for key, value in METHODS[case].items() if key == "target"}
                entry = one(dense, work / "out", {"blueprint": plans[case], **given}, tokens, ids_NW)
            else:
                plans[case].mkdir(parents=True, exist_ok=True)
                keep = plans[case] if dtype == "float32" else None
                entry = one(dense, work / "out", METHODS[case], tokens, ids_NW, keep)
            line = {"model": model.name, "case": case, "dtype": dtype, "tokens": tokens, **entry}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            print(model.name, case, dtype, entry.get("ppl", entry.get("error")), flush=True)


def page(results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The table of all models, in Markdown."""
    rows = [
        "# bf16 beside fp32",
        "",
        "`python -m benchmarks.dtypes WORK MODEL...`: every method on one model stored in bf16 and in fp32.",
        "Each output passed `verify --baseline` (and `--parity` for glm4_moe) before it was evaluated.",
        "Figures are perplexity over the dense model of the same dtype, computed in that dtype.",
        f"A difference is relative to fp32; at most {BOUND:.1%} counts as equal.",
        "Calibration and training are short here: the rows compare dtypes, not methods.",
        "",
        "Some methods choose by comparing near-equal scores, and choose others where the weights were rounded.",
        "The last two columns apply the decisions made in fp32 to the bf16 checkpoint: what is left is the rounding.",
        "Routers then still meet near ties, which rounding decides: the worse a conversion, the more that shows.",
        "A dash was not measured.",
    ]
    for model in dict.fromkeys(key[0] for key in results):
        dense = results[model, "dense", "bfloat16"]
        rows += ["", f"## {model}, {dense['name']}, {dense['tokens']} tokens of calibration", ""]
        rows += ["| method | architecture | fp32 | bf16 | difference | bf16, same decisions | difference |"]
        rows += ["|---|---|---|---|---|---|---|", *(row(model, case, results) for case in METHODS)]
    return "\n".join(rows) + "\n"


def row(model: str, case: str, results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """One method's line; what was not measured is a dash."""
    ratio: dict[str, float] = {}
    texts: dict[str, str] = {}
    target = "-"
    for dtype in (*DTYPES, SAME):
        line = results.get((model, case, dtype))
        dense = results.get((model, "dense", "float32" if dtype == "float32" else "bfloat16"))
        texts[dtype] = "-"
        if line is not None and "error" in line:
            texts[dtype] = line["error"]
        elif line is not None and dense is not None:
            ratio[dtype] = compare(as_perplexity(line), as_perplexity(dense)).ratio
            texts[dtype], target = f"{ratio[dtype]:.4f}", line["target"]
    change = {d: f"{ratio[d] / ratio['float32'] - 1:+.2%}" for d in ratio if "float32" in ratio}
    cells = [case, target, texts["float32"], texts["bfloat16"], change.get("bfloat16", "-")]
    return "| " + " | ".join([*cells, texts[SAME], change.get(SAME, "-")]) + " |"


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
    results = known(given.work / "dtypes.jsonl")
    write_rows(given.page.with_suffix(".json"), list(results.values()))
    given.page.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
