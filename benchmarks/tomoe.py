"""ToMoE on a real model beside its controls: perplexity against active parameters, coverage, load.

    python -m benchmarks.tomoe MODEL WORK [--runs tomoe-50 static-50 ...] [--steps 200] [--report docs/results/tomoe]

Every run is a `moesaic convert` into WORK/<run>: interrupted, the same command resumes; a finished run is not repeated.
Runs: <kind>-<percent active>; kinds are the keys of KINDS. Training text: WikiText-2 validation, Wikipedia, stories and
code that ship with moesaic, or --text FILE; the C4 sample is kept out of it, for evaluation.

`--report` writes PATH.json and PATH.md from all finished runs in WORK.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import write_rows
from transformers import AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.samples import evaluation_text, sample_text
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity, token_windows
from moesaic.jobs.convert import convert
from moesaic.jobs.evaluate import evaluate_model
from moesaic.methods.base import ModelPlan
from moesaic.methods.tomoe.hard import hard_mask_model
from moesaic.methods.tomoe.samplers import top_k_of
from moesaic.progress import Silent
from moesaic.train.loop import read_log

TEXTS = ["wikitext=2", "wiki=1", "tiny=0.5", "code=0.5"]
KINDS: dict[str, dict[str, Any]] = {
    "tomoe": {},
    "static": {"experts": 1},
    "random": {"masks": "random"},
    "no-union": {"union_weight": 0.0},
    "noise": {"start": "noise"},
    "ffn": {"attention": "none", "counted": "ffn", "widths": "equal"},
    "ffn-static": {"attention": "none", "counted": "ffn", "experts": 1},
}
"""Options of a run beside the defaults of :func:`options`."""
PUBLISHED = {"tomoe-70": "1.25", "tomoe-60": "1.40", "tomoe-50": "1.63"}


class Lines(Silent):
    """Progress as plain lines, a few of them."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def start(self, label: str, total: int) -> None:
        self.done, self.total = 0, total
        print(label, total, flush=True)

    def advance(self, detail: str = "") -> None:
        self.done += 1
        if self.done % max(1, self.total // 20) == 0:
            print(f"  {self.done}/{self.total} {detail}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


def options(run: str, steps: int, batch: int) -> dict[str, Any]:
    """The method's options of a run named <kind>-<percent>."""
    kind, _, percent = run.rpartition("-")
    if kind not in KINDS:
        sys.exit(f"unknown run {run}: kinds are {', '.join(KINDS)}")
    train = {"steps": steps, "batch": batch, "eval_every": max(steps // 4, 1), "save_every": 25}
    return {"active": int(percent) / 100, "attention": "both", "train": train} | KINDS[kind]


def train(args: argparse.Namespace, run: str) -> None:
    """Convert, then evaluate on WikiText-2 and C4; the figures go to WORK/<run>.json."""
    output, figures = args.work / run, args.work / f"{run}.json"
    if figures.exists():
        return
    chosen = options(run, args.steps, args.batch)
    tokens = (args.steps * args.batch + 8) * args.window
    calibration = {"sources": args.text or TEXTS, "tokens": min(tokens, args.tokens), "window": args.window}
    if not output.exists():
        convert(
            args.model,
            output,
            settings={"method": "tomoe", "options": chosen, "calibration": calibration, "target": "moesaic"},
            progress=Lines(),
        )
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    entry = {"run": run, "options": chosen, "threads": torch.get_num_threads(), "training": results["training"]}
    entry["perplexity"] = evaluate(output, args)
    write_rows(figures, entry)


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a folder on WikiText-2 (test) and on the C4 sample."""
    c4 = args.work / "c4.txt"
    c4.write_text(sample_text("c4"), encoding="utf-8")
    found = {}
    for name, text, limit in (("WikiText-2", None, args.windows), ("C4", c4, args.windows // 2)):
        shown = evaluate_model(
            folder, text=text, window=1024, limit=limit, fidelity=False, save=False, progress=Lines()
        )
        found[name] = shown["perplexity"]["model"]
    return found


def hard_parity(args: argparse.Namespace, run: str) -> dict[str, float]:
    """The exported model against masks on the dense one, 512 tokens of WikiText-2, fp32; kept in WORK."""
    kept = args.work / run / "hard_parity.json"
    if not kept.exists():
        blueprint = Blueprint.load(args.work / run)
        plan = ModelPlan(blueprint.sites, blueprint.attention)
        dense, made = (load_model(folder, torch.float32) for folder in (args.model, args.work / run))
        ids = token_windows(AutoTokenizer.from_pretrained(args.model), evaluation_text(), 512, 1)
        anatomy = read_anatomy(Checkpoint(args.model).config)
        routes: list[torch.Tensor] = []
        for module in made.modules():
            if getattr(module, "router", None) is not None:
                top_k = module.top_k
                module.router.register_forward_hook(
                    lambda _module, _inputs, z_TE, top_k=top_k: routes.append(top_k_of(z_TE, top_k))
                )
        with torch.no_grad(), hard_mask_model(dense, plan, anatomy) as gates:
            expected = dense(input_ids=ids).logits
            wanted = [gates.routes[place].flatten(0, -2) for place in sorted(gates.routes)]
        with torch.no_grad():
            found = made(input_ids=ids).logits
        same = [float((a == b).all(-1).float().mean()) for a, b in zip(routes, wanted, strict=True)]
        figures = {"delta": float((found - expected).abs().max()), "routing": min(same, default=1.0)}
        write_rows(kept, figures)
    return json.loads(kept.read_text(encoding="utf-8"))


def report(args: argparse.Namespace) -> None:
    """One table of all finished runs, one of their held-out curves; the dense model is evaluated once."""
    dense_file = args.work / "dense.json"
    if not dense_file.exists():
        write_rows(dense_file, evaluate(args.model, args))
    dense = {name: _perplexity(table) for name, table in json.loads(dense_file.read_text(encoding="utf-8")).items()}
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in args.work.glob("*-*.json")]
    entries.sort(key=lambda entry: (-entry["options"]["active"], list(KINDS).index(entry["run"].rpartition("-")[0])))
    for entry in entries:
        log = read_log(args.work / entry["run"])
        results = json.loads((args.work / entry["run"] / "results.json").read_text(encoding="utf-8"))
        entry["seconds"] = results["conversion"]["seconds"]
        made = json.loads((args.work / entry["run"] / "config.json").read_text(encoding="utf-8"))["moesaic"]
        sources = made["calibration"]["sources"]
        entry["text"] = [f"{Path(source['name']).name} x {source['weight']:g}" for source in sources]
        entry["held_out"] = {line["step"]: line["held_out"] for line in log if "held_out" in line}
        entry["hard_mask"] = hard_parity(args, entry["run"])
    write_rows(args.report.with_suffix(".json"), entries)
    deltas = sorted((entry["hard_mask"]["delta"], entry["run"]) for entry in entries)
    routing = min(entry["hard_mask"]["routing"] for entry in entries)
    parity = (
        f"Every export against the hard masks on the dense model, 512 tokens, fp32: logits within {deltas[-1][0]:.1e} "
        f"({deltas[-1][1]}; the others {deltas[-2:][0][0]:.1e}), the same expert for {routing:.2%} of the tokens in "
        "the worst layer."
    )
    lines = [*_head(entries, dense, args), "", *_quality(entries, dense), "", parity, "", *_curves(entries)]
    args.report.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _head(entries: list[dict[str, Any]], dense: dict[str, Perplexity], args: argparse.Namespace) -> list[str]:
    values = ", ".join(f"{name} {value.value:.2f} ({value.name})" for name, value in dense.items())
    minutes = [entry["seconds"] / 60 for entry in entries]
    train = entries[0]["options"]["train"]
    return [
        "# ToMoE on a small budget",
        "",
        f"{args.model.name}. Every run: {train['steps']} steps of {train['batch'] * args.window} tokens, the model "
        f"frozen, hard masks exported; {min(minutes):.0f} to {max(minutes):.0f} minutes with {entries[0]['threads']} "
        f"thread(s), export included. Training text: {', '.join(entries[0]['text'])}. Made by `benchmarks/tomoe.py`.",
        f"Perplexity of the dense model: {values}.",
        "",
        "Runs: `tomoe` 8 experts, top-1, masks and routers learned from token clusters on; `static` one mask for all "
        "tokens, learned; `random` masks drawn once, routers learned; `no-union` without R_U; `noise` started from "
        "noise; `ffn` FFNs alone. In all but `ffn` attention is pruned too, and active is a share of both. Ratio to "
        "dense: 95 % interval over windows. Published: LLaMA-2 7B on WikiText-2 (arXiv 2501.15316), trained on more "
        "than 10 million tokens.",
    ]


def _quality(entries: list[dict[str, Any]], dense: dict[str, Perplexity]) -> list[str]:
    head = "| run | active | FFN active | coverage | largest load |"
    head += "".join(f" {name} | over dense |" for name in dense) + " published |"
    lines = [head, "|---|" + "---|" * (5 + 2 * len(dense))]
    for entry in entries:
        trained = entry["training"]
        cells = [f"{trained['active']:.1%}", f"{trained['active_ffn']:.1%}", f"{trained['coverage']:.1%}"]
        cells.append(f"{trained['load_max']:.2f}")
        for name, table in entry["perplexity"].items():
            model = _perplexity(table)
            ratio = compare(model, dense[name])
            cells += [f"{model.value:.2f}", ratio.shown(2)]
        cells.append(PUBLISHED.get(entry["run"], ""))
        lines.append(f"| {entry['run']} | {' | '.join(cells)} |")
    return lines


def _curves(entries: list[dict[str, Any]]) -> list[str]:
    """KL to the dense model on held-out text, hard masks, by step."""
    steps = sorted({step for entry in entries for step in entry["held_out"]})
    lines = ["Held-out KL to the dense model (hard masks), by step:", ""]
    lines += [f"| run | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
    for entry in entries:
        cells = [f"{entry['held_out'][step]['kd']:.3f}" if step in entry["held_out"] else "" for step in steps]
        lines.append(f"| {entry['run']} | {' | '.join(cells)} |")
    return lines


def _perplexity(table: dict[str, Any]) -> Perplexity:
    return Perplexity(**(table | {"window_nll": tuple(table["window_nll"])}))


def main() -> None:
    """Runs in the order given, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="windows per step")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=200_000, help="distinct training tokens at most")
    parser.add_argument(
        "--windows", type=int, default=16, help="evaluation windows of 1024 tokens; C4 has half as many"
    )
    parser.add_argument("--text", nargs="*", help="training text in place of the shipped one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for run in args.runs:
        train(args, run)
    if args.report:
        report(args)


if __name__ == "__main__":
    main()
