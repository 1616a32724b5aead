"""What does `torch.compile` of a whole model give, dense and converted, in decoding with a static cache?

    python -m benchmarks.compiled_decode DENSE "neuron experts=FOLDER" ... [--threads 2]

A prompt of random tokens is read, then one token after another is decoded, batch 1. Each model does so as it is and
compiled, in turns whose order is shuffled. Printed are milliseconds per token and how many times as fast as the dense
model as it is, by minimum and median, and whether the compiled model said the same tokens. Each compilation takes about
a minute.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from moesaic.nn.register import register

Decoded = tuple[list[float], list[int]]
"""Seconds and ids of the decoded tokens."""


def decode(model: Any, step: Callable[..., Any], prompt_1W: torch.Tensor, steps: int) -> Decoded:
    """Greedily, the prompt by ``model``, each further token by ``step``."""
    seconds, ids = [], []
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=prompt_1W.shape[1] + steps)
        logits = model(prompt_1W, past_key_values=cache, use_cache=True).logits
        for place in range(prompt_1W.shape[1], prompt_1W.shape[1] + steps):
            token_11 = logits[:, -1:].argmax(-1)
            ids.append(int(token_11))
            begin = time.perf_counter()
            at_11 = torch.tensor([[place]])
            logits = step(input_ids=token_11, past_key_values=cache, use_cache=True, position_ids=at_11).logits
            seconds.append(time.perf_counter() - begin)
    return seconds, ids


def measure(models: dict[str, Any], backend: str, prompt: int, steps: int, rounds: int) -> dict[str, list[Decoded]]:
    """Each model as it is, and compiled: what it decoded in every round."""
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    prompt_1W = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    step_of: dict[str, tuple[Any, Callable[..., Any]]] = {}
    for name, model in models.items():
        compiled = torch.compile(model.forward, dynamic=False, backend=backend)
        step_of |= {name: (model, model), f"{name}, compiled": (model, compiled)}
    for model, step in step_of.values():  # weights are laid side by side, and functions are compiled
        decode(model, step, prompt_1W, steps)
    found: dict[str, list[Decoded]] = {name: [] for name in step_of}
    for _ in range(rounds):
        for name in random.sample(list(step_of), len(step_of)):
            found[name].append(decode(*step_of[name], prompt_1W, steps))
    return found


def lines(found: dict[str, list[Decoded]]) -> list[str]:
    """A line per model; the first is that to which others are compared."""
    seconds = {name: [second for own, _ in rounds for second in own] for name, rounds in found.items()}
    dense = next(iter(seconds.values()))
    rows = []
    for name, own in seconds.items():
        as_it_is = found[name.removesuffix(", compiled")]
        cells = [f"{1e3 * min(own):.1f} / {1e3 * statistics.median(own):.1f}"]
        cells.append(f"{min(dense) / min(own):.2f} / {statistics.median(dense) / statistics.median(own):.2f}")
        cells.append("yes" if [ids for _, ids in found[name]] == [ids for _, ids in as_it_is] else "no")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return ["| | ms per token | times dense | same tokens |", "|---|---|---|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("folders", nargs="*", help="NAME=FOLDER of converted models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    for name, number in (("prompt", 64), ("steps", 16), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register()
    folders = {"dense": str(args.dense)} | dict(given.split("=", 1) for given in args.folders)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
        for name, folder in folders.items()
    }
    print("\n".join(lines(measure(models, args.backend, args.prompt, args.steps, args.rounds))))


if __name__ == "__main__":
    main()
