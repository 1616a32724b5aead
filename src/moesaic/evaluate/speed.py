"""Speed of the converted model beside the dense one: interleaved in one run, medians, never alone.

Units: tokens per second of wall-clock time. Prefill: one forward over a prompt, with the logits of its last token only,
as in generation. Decode: greedy steps with a KV cache.

Axes: R rounds and one to warm up, W tokens of a prompt.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.options.device import device_of, wait_for

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model: of one round, or medians over rounds."""

    prefill: float
    decode: float

    def to_dict(self) -> dict[str, float]:
        """For results.json."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """One model's speed over another's: median and extremes of the ratios within a round."""

    median: float
    low: float
    high: float


def measure(models: Mapping[str, Any], *, prompt: int = 256, steps: int = 24, rounds: int = 3) -> dict[str, Speed]:
    """Median speed of several models on this machine.

    Args:
        models: transformers causal language models by name.
        prompt: Prompt tokens, the same random ones for all models of a round.
        steps: Decode steps after it.
        rounds: Rounds over all models. One more, uncounted, warms up.
    """
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    prompts_RW = torch.randint(0, vocabulary, (rounds + 1, prompt), generator=torch.Generator().manual_seed(0))
    return {name: median_speed(found) for name, found in measure_rounds(models, prompts_RW, steps).items()}


def measure_rounds(models: Mapping[str, Any], prompts_RW: Tensor, steps: int) -> dict[str, list[Speed]]:
    """Speed of several models in every round but the first, which warms up.

    Each round has a new prompt, and a new order of the models, so that a busy moment hits all of them alike.
    """
    found: dict[str, list[Speed]] = {name: [] for name in models}
    shuffled = random.Random(0)
    for number, ids_W in enumerate(prompts_RW):
        for name in shuffled.sample(list(models), len(models)):
            speed = _one_round(models[name].eval(), ids_W[None], steps if number else _WARM_UP_STEPS)
            if number:
                found[name].append(speed)
    return found


def median_speed(rounds: Sequence[Speed]) -> Speed:
    """Prefill and decode, each the median over rounds."""
    return Speed(statistics.median(r.prefill for r in rounds), statistics.median(r.decode for r in rounds))


def ratio(kind: str, rounds: Sequence[Speed], base: Sequence[Speed]) -> Ratio:
    """How many times as fast as ``base`` in the same rounds; ``kind``: ``prefill`` or ``decode``."""
    ratios = [getattr(one, kind) / getattr(other, kind) for one, other in zip(rounds, base, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@torch.inference_mode()
def _one_round(model: Any, ids_1W: Tensor, steps: int) -> Speed:
    device = device_of(model)
    ids_1W = ids_1W.to(device)
    first, out = _timed(device, lambda: model(input_ids=ids_1W, use_cache=True, logits_to_keep=1))
    rest, _ = _timed(device, lambda: _decode(model, out, steps))
    return Speed(ids_1W.shape[1] / first, steps / rest)


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    wait_for(device)
    started = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - started, result


def _decode(model: Any, out: Any, steps: int) -> None:
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(dim=-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
