"""Does a bf16 checkpoint convert as well as its fp32 original? Every method on both, each verified and evaluated.

    python -m benchmarks.dtypes WORK FP32_MODEL [FP32_MODEL ...]

Each model is copied to both dtypes in WORK. Every method converts both copies, `verify --baseline` judges the result,
and perplexity is measured beside the dense model of the same dtype. Some methods choose other neurons where weights
differ in the ninth bit, so the fp32 copy's decisions are applied to the bf16 copy as well (`--blueprint`). What is left
of routed methods then is taken apart on more windows (benchmarks/near_ties.py). Results are appended to
WORK/dtypes.jsonl as they come; a run that is started again goes on. It writes docs/results/dtypes.json and dtypes.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.near_ties import Ties, over_dense, percent, table, verdict
from benchmarks.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from moesaic.blueprint.model import Blueprint
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
NEAR_TIES = "near ties"
BOUND = 0.005
"""Largest difference of the ratios to dense that counts as equal, relative."""
FEWEST = 4
"""Windows from which on an interval says something."""
CHUNK = 4
"""Windows of near ties between two lines of the log."""
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
ROUTED = ("cmoe", "cmoe, glm4_moe", "token clusters, copies", "tomoe", "token clusters, union", "moefication", "random")
"""Cases whose routers meet near ties."""


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


def run_ties(work: Path, model: Path, tokens: int, windows: int, cases: Sequence[str] = ROUTED) -> None:
    """What the log lacks of near ties, for blueprints that :func:`run` has left."""
    log = work / "dtypes.jsonl"
    folders = {dtype: cast_copy(model, work / f"{model.name}-{dtype}", dtype) for dtype in DTYPES}
    ids_NW = token_windows(AutoTokenizer.from_pretrained(model), evaluation_text(), WINDOW, windows)
    for case in ("dense", *cases):
        plans = work / "blueprints" / model.name / case
        before = known(log).get((model.name, case, NEAR_TIES), {}).get("windows", [])
        if len(before) >= windows or not (case == "dense" or plans.is_dir()):
            continue
        ties = Ties(folders, None if case == "dense" else Blueprint.load(plans))
        for ids_W in ids_NW[len(before) :]:
            before.append(ties.window(ids_W))
            if len(before) % CHUNK and len(before) < windows:
                continue
            line = {"model": model.name, "case": case, "dtype": NEAR_TIES, "tokens": tokens}
            line |= {"predicted": WINDOW - 1, "windows": before}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            print(model.name, case, NEAR_TIES, len(before), flush=True)


def page(results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The table of all models, in Markdown."""
    rows = [
        "# bf16 beside fp32",
        "",
        "`python -m benchmarks.dtypes WORK MODEL...`: every method on one model stored in bf16 and in fp32.",
        "Each output passed `verify --baseline` (and `--parity` for glm4_moe) before it was evaluated.",
        "Figures are perplexity over the dense model of the same dtype, computed in that dtype.",
        f"A difference is relative to fp32, with its 95 % interval over windows, where there are {FEWEST} or more.",
        f"At most {BOUND:.1%} counts as equal.",
        "Calibration and training are short here: the rows compare dtypes, not methods.",
        "",
        "Some methods choose by comparing near-equal scores, and choose others where the weights were rounded.",
        "The last two columns apply the decisions made in fp32 to the bf16 checkpoint: what is left is the rounding.",
        "A dash was not measured.",
        "",
        "Routers still meet near ties, which rounding decides. Below each table these are taken apart on more windows.",
        "bf16 and fp32 have the decisions of fp32 there and are computed by our runtime.",
        "First the share of tokens and FFNs for which bf16 chooses other experts.",
        "Then bf16 beside fp32: as it is, and with the experts that fp32 chose.",
        "Last a control: fp32 whose routers read their inputs rounded to bf16, beside fp32. All else is fp32 there.",
    ]
    for model in dict.fromkeys(key[0] for key in results):
        dense = results[model, "dense", "bfloat16"]
        rows += ["", f"## {model}, {dense['name']}, {dense['tokens']} tokens of calibration", ""]
        rows += ["| method | architecture | fp32 | bf16 | difference | bf16, same decisions | difference |"]
        rows += ["|---|---|---|---|---|---|---|", *(row(model, case, results) for case in METHODS)]
        ties = {case: results[model, case, NEAR_TIES] for case in ROUTED if (model, case, NEAR_TIES) in results}
        if ties:
            rows += ["", f"### Near ties: {model}, windows of {WINDOW} tokens", ""]
            dense = results[model, "dense", NEAR_TIES]
            rows += [*table(ties, dense), "", verdict(ties, dense, BOUND)]
    return "\n".join(rows) + "\n"


def row(model: str, case: str, results: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """One method's line; what was not measured is a dash."""
    ratio: dict[str, Perplexity] = {}
    texts: dict[str, str] = {}
    target = "-"
    for dtype in (*DTYPES, SAME):
        line = results.get((model, case, dtype))
        dense = results.get((model, "dense", "float32" if dtype == "float32" else "bfloat16"))
        texts[dtype] = "-"
        if line is not None and "error" in line:
            texts[dtype] = line["error"]
        elif line is not None and dense is not None:
            ratio[dtype] = over_dense(as_perplexity(line), as_perplexity(dense))
            texts[dtype], target = f"{ratio[dtype].value:.4f}", line["target"]
    change = {
        d: percent(compare(found, ratio["float32"]), len(found.window_nll) >= FEWEST)
        for d, found in ratio.items()
        if "float32" in ratio
    }
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
    parser.add_argument("--ties", type=int, default=16, help=f"windows of {WINDOW} tokens for near ties; 0: none")
    parser.add_argument("--page", type=Path, default=Path("docs/results/dtypes.md"))
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    run(given.work, given.models, given.tokens, given.windows)
    for model in given.models if given.ties else ():
        run_ties(given.work, model, given.tokens, given.ties)
    results = known(given.work / "dtypes.jsonl")
    write_rows(given.page.with_suffix(".json"), list(results.values()))
    given.page.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
