"""How fast does a converted model decode one token after another on a CPU, beside its dense model?

    python -m benchmarks.decode DENSE NAME=FOLDER ... [--threads 2] [--dtype bfloat16] [--steps 64] [--rounds 3]
    python -m benchmarks.decode DENSE neurons=FOLDER --active 0.5 0.33 0.25 --weight-only int8 int4

Every folder is a contender twice: by the runtime's own choice of paths, and by torch alone, for which gradients'
absence is all that differs. `all rows` is the first folder with all experts on: the compiled kernel without routing.
A folder of neuron experts is one more contender for each share in `--active`. `--weight-only` adds the dense model with
the linear layers of its blocks in 8 or 4 bits by torch's own products (bf16; embeddings and head stay as they are).

All models are in memory, and all decode the same step before any decodes the next, in an order that is shuffled anew.
So a busy moment hits all alike. Reported are milliseconds per token, minimum and median over all steps, and how many
times as fast as dense: the ratio of the minima, and the median of the ratios within a step.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.machine import CLOCKS, cpu_name
from benchmarks.weight_only import WEIGHT_ONLY, quantised
from transformers import AutoModelForCausalLM

from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.register import register

DENSE = "dense"
TORCH = ("masked", "every")


class Contender:
    """A model with a KV cache, and in which way it computes."""

    def __init__(self, model: Any, way: Callable[[], Any] = nullcontext) -> None:
        self.model, self.way, self.out = model, way, None

    def begin(self, ids_1W: torch.Tensor) -> None:
        """Read the prompt."""
        with self.way():
            self.out = self.model(input_ids=ids_1W, use_cache=True, logits_to_keep=1)

    def step(self, clock: Callable[[], float]) -> float:
        """Decode a token; seconds."""
        out: Any = self.out
        token = out.logits[:, -1:].argmax(dim=-1)
        begin = clock()
        with self.way():
            self.out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return clock() - begin


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


def contenders(
    dense: Path, folders: dict[str, Path], dtype: torch.dtype, active: list[float], weight_only: list[str]
) -> dict[str, Contender]:
    """The dense model first."""

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    found = {DENSE: Contender(load(dense))}
    for kind in weight_only:
        found[f"{DENSE}, torch {kind}"] = Contender(quantised(found[DENSE].model, kind, keep=("lm_head",)))
    for name, folder in folders.items():
        model = load(folder)
        found[name] = Contender(model)
        found[f"{name}, torch"] = Contender(model, lambda model=model: model.use_path(*TORCH))
        if "all rows" not in found:
            found["all rows"] = Contender(model, lambda model=model: _all_on(model))
        neurons = [ffn for ffn in model.modules() if isinstance(ffn, NeuronFeedForward)]
        for share in active if neurons else []:
            way = partial(_at, neurons, share)
            found[f"{name}, {100 * share:.0f} %"] = Contender(model, way)
    return found


@torch.inference_mode()
def measure(
    found: dict[str, Contender], clock: Callable[[], float], steps: int, rounds: int, prompt: int
) -> dict[str, list[float]]:
    """Seconds of every step of every contender. One round more warms up."""
    vocabulary = min(int(one.model.config.get_text_config().vocab_size) for one in found.values())
    shuffled, seconds = random.Random(0), {name: [] for name in found}
    for turn in range(rounds + 1):
        ids_1W = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(turn))
        for one in found.values():
            one.begin(ids_1W)
        for _ in range(steps if turn else 3):
            for name in shuffled.sample(list(found), len(found)):
                elapsed = found[name].step(clock)
                if turn:
                    seconds[name].append(elapsed)
    return seconds


def markdown(seconds: dict[str, list[float]]) -> str:
    """A row per contender."""
    lines = ["| | ms per token, min | median | times dense, of minima | median |", "|---|---|---|---|---|"]
    dense = seconds[DENSE]
    for name, own in seconds.items():
        ratio = statistics.median(other / mine for other, mine in zip(dense, own, strict=True))
        numbers = (
            f"{1e3 * min(own):.2f} | {1e3 * statistics.median(own):.2f} | {min(dense) / min(own):.2f} | {ratio:.2f}"
        )
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("folders", nargs="+", help="NAME=FOLDER of converted models")
    parser.add_argument("--active", type=float, nargs="+", default=[], help="shares of neuron experts, besides its own")
    parser.add_argument("--weight-only", nargs="+", default=[], choices=list(WEIGHT_ONLY))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a busy machine and 1 thread")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register()
    folders = {name: Path(path) for name, _, path in (given.partition("=") for given in args.folders)}
    found = contenders(args.dense, folders, getattr(torch, args.dtype), args.active, args.weight_only)
    print(
        f"{cpu_name()}, {args.threads} threads, {args.clock} clock, {args.dtype}, torch {torch.__version__}, ", end=""
    )
    print(f"transformers {transformers.__version__}\n")
    print(markdown(measure(found, CLOCKS[args.clock], args.steps, args.rounds, args.prompt)))


if __name__ == "__main__":
    main()
