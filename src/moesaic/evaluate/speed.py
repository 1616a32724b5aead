"""Speed of the converted model beside the dense one: interleaved in one run, medians, never alone.

Units: tokens per second of wall-clock time. Prefill: one forward over a prompt. Decode: greedy steps with a KV cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Speed:
    """Median tokens per second of one model."""

    prefill: float
    decode: float

    def to_dict(self) -> dict[str, float]:
        """For results.json."""
        return asdict(self)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def measure(models: Mapping[str, Any], *, prompt: int = 256, steps: int = 24, rounds: int = 3) -> dict[str, Speed]:
    """Speed of several models on this machine, round-robin, so that a busy moment hits all of them.

    Args:
        models: transformers causal language models by name.
        prompt: Prompt tokens.
        steps: Decode steps after it.
        rounds: Rounds over all models; the median counts. One more, uncounted, warms up.
    """
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    ids_NW = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            model.eval()
            out = model(input_ids=ids_NW, use_cache=True)
            first = _seconds(lambda model=model: model(input_ids=ids_NW, use_cache=True))
            rest = _seconds(lambda model=model, out=out: _decode(model, out, steps))
            if round_number > 0:
                prefill[name].append(prompt / first)
                decode[name].append(steps / rest)
    return {name: Speed(statistics.median(prefill[name]), statistics.median(decode[name])) for name in models}


def _decode(model: Any, out: Any, steps: int) -> None:
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
