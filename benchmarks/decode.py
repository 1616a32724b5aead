"""How fast does a converted model read a prompt and decode on a CPU, beside its dense model?

    python -m benchmarks.decode NAME DENSE "CMoE S2A2E8=FOLDER" ... [--threads 2] [--report docs/results/decode]
    python -m benchmarks.decode NAME DENSE "neuron experts=FOLDER" --active 0.5 0.33 0.25 --weight-only int8 int4

Every folder is a contender by the runtime's own choice of paths; with `--torch` also by torch alone. `all rows` is the
first folder with all experts on: the compiled kernel without routing. A folder of neuron experts is a contender for
each share in `--active` instead. `--weight-only` adds the dense model with the linear layers of its blocks in 8 or 4
bits by torch's own products (bf16; embeddings and head stay as they are).

All models are in memory, and all decode the same step before any decodes the next, in an order that is shuffled anew.
So a busy moment hits all alike. Reported are milliseconds, minimum and median, and how many times as fast as dense: the
ratio of the minima, and the median of the ratios within a step. `--report` keeps one model's figures under NAME in
REPORT.json, beside those of others, and writes REPORT.md of all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.ffn import BOTH, Row, ratios
from benchmarks.machine import CLOCKS, conditions
from benchmarks.rows import write_rows
from benchmarks.weight_only import WEIGHT_ONLY, quantised
from transformers import AutoModelForCausalLM

from moesaic.durable import replace_text
from moesaic.evaluate.speed import Contender, Turns, take_turns
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.register import register

DENSE, ALL_ROWS = "dense", "all rows"
TORCH = ("masked", "every")

INTRO = """# Decoding in transformers, dense beside converted

    python -m benchmarks.decode NAME DENSE NAME=FOLDER ... --active 0.5 0.33 0.25 --weight-only int8 int4 --threads 2 \\
        --report docs/results/decode

A prompt of random tokens is read, then one token after another is decoded, batch 1. All models do the same step before
any does the next, in a new order each time. Each cell has the minimum / the median of milliseconds, or the ratio of the
minima / the median of the ratios within a step. Above 1 is faster than dense. Prompts are read once per round only, so
their medians say more.

Converted models decode by a kernel that is compiled at its first use. It reads exactly the rows that a token wants,
with gate, up and down of a neuron side by side. From a few tokens on it computes blocks of 64 neurons, each row once
for all tokens that want it. In neuron experts one call scores all neurons by their low-bit copies, chooses, and
computes the chosen ones. They read a prompt by the dense network, unless that is switched off.

* `all rows`: the first converted model with all experts on. That is what the kernel gives without routing.
* Token clusters use their share in the mean over the text that they were fitted on. Random tokens may use another.
* `torch int8`, `torch int4`: the dense model, its blocks' layers in torch's own weight-only products. Embeddings and
  head stay in bf16.
"""


@contextmanager
def _all_on(model: Any) -> Iterator[None]:
    model.all_experts_on(True)
    try:
        with model.use_path("rows", *TORCH):
            yield
    finally:
        model.all_experts_on(False)


@contextmanager
def _at(ffns: list[NeuronFeedForward], share: float) -> Iterator[None]:
    before = [ffn.top_k for ffn in ffns]
    for ffn in ffns:
        ffn.top_k = round(share * ffn.neurons)
    try:
        yield
    finally:
        for ffn, top_k in zip(ffns, before, strict=True):
            ffn.top_k = top_k


def contenders(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Contender]:
    """The dense model first."""

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    found = {DENSE: Contender(load(args.dense))}
    for kind in args.weight_only:
        found[f"{DENSE}, torch {kind}"] = Contender(quantised(found[DENSE].model, kind, keep=("lm_head",)))
    for name, _, folder in (given.partition("=") for given in args.folders):
        model = load(folder)
        if ALL_ROWS not in found:
            found[ALL_ROWS] = Contender(model, lambda model=model: _all_on(model))
        neurons = [ffn for ffn in model.modules() if isinstance(ffn, NeuronFeedForward)]
        shares = args.active if neurons else []
        for share in shares:
            found[f"{name} {100 * share:.0f} %"] = Contender(model, partial(_at, neurons, share))
        if not shares:
            found[name] = Contender(model)
        if args.torch:
            found[f"{name}, torch"] = Contender(model, lambda model=model: model.use_path(*TORCH))
    return found


def prompts(found: dict[str, Contender], rounds: int, prompt: int) -> torch.Tensor:
    """Random token ids, int64 [rounds and one, 1, prompt]."""
    vocabulary = min(int(one.model.config.get_text_config().vocab_size) for one in found.values())
    turns = (torch.Generator().manual_seed(turn) for turn in range(rounds + 1))
    return torch.stack([torch.randint(0, vocabulary, (1, prompt), generator=generator) for generator in turns])


def rows_of(found: dict[str, Turns]) -> list[Row]:
    """A row per contender: milliseconds [minimum, median] and times dense [of the minima, median within a step]."""
    return [
        {
            "name": name,
            **{f"{part}_ms": [round(1e3 * figure(own[name]), 2) for figure in BOTH] for part, own in both.items()},
            **{f"{part}_times_dense": ratios(own[DENSE], own[name]) for part, own in both.items()},
        }
        for both in (
            {part: {one: getattr(turns, part) for one, turns in found.items()} for part in ("decode", "prefill")},
        )
        for name in found
    ]


def markdown(models: dict[str, Any]) -> str:
    """The page of all models."""
    return "\n\n".join([INTRO.strip(), *(_section(name, **found) for name, found in models.items())]) + "\n"


def _section(name: str, conditions: dict[str, Any], rows: list[Row]) -> str:
    """Every figure is of one run."""
    lines = [f"## {name}", "", ", ".join(f"{key} {value}" for key, value in conditions.items()) + ".", ""]
    lines += ["| | decode, ms per token | times dense | prefill, ms | times dense |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["decode_ms"], row["decode_times_dense"], row["prefill_ms"], row["prefill_times_dense"])
        lines.append(f"| {row['name']} | {' | '.join(f'{least:.2f} / {middle:.2f}' for least, middle in cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    register()
    found = contenders(args, getattr(torch, args.dtype))
    ids_R1W = prompts(found, args.rounds, args.prompt)
    rows = rows_of(take_turns(found, ids_R1W, args.steps, CLOCKS[args.clock]))
    settings = {key: getattr(args, key) for key in ("dtype", "prompt", "steps", "rounds")}
    own = {args.name: {"conditions": conditions(args.clock) | settings, "rows": rows}}
    print(_section(args.name, **own[args.name]))
    if args.report is not None:
        file = args.report.with_suffix(".json")
        models = (json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}) | own
        write_rows(file, models)
        replace_text(args.report.with_suffix(".md"), markdown(models))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the model, on the page")
    parser.add_argument("dense", type=Path)
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER of converted models")
    parser.add_argument("--active", type=float, nargs="+", default=[], help="shares of neuron experts")
    parser.add_argument("--weight-only", nargs="+", default=[], choices=list(WEIGHT_ONLY))
    parser.add_argument("--torch", action="store_true", help="also every folder without the compiled kernel")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a busy machine and 1 thread")
    parser.add_argument("--report", type=Path, help="write REPORT.json and REPORT.md there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
