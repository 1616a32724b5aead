"""Speed of the converted model beside the dense one: interleaved in one run, medians, never alone.

Units: tokens per second of wall-clock time. Prefill: one forward over a prompt, with the logits of its last token only,
as in generation. Decode: greedy steps with a KV cache.

All models are in memory, and all do the same step before any does the next, in an order that is shuffled anew. So a
busy moment hits all alike.

Axes: R rounds and one to warm up, B sequences, W tokens of a prompt.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    """Speed of several models in every round but the first, which warms up; each has a new prompt."""
    found = take_turns({name: Contender(model.eval()) for name, model in models.items()}, prompts_RW[:, None], steps)
    width = prompts_RW.shape[1]
    return {
        name: [
            Speed(width / first, steps / sum(turns.decode[number * steps : (number + 1) * steps]))
            for number, first in enumerate(turns.prefill)
        ]
        for name, turns in found.items()
    }


class Contender:
    """A model with a KV cache, and in which way it computes."""

    def __init__(self, model: Any, way: Callable[[], Any] = nullcontext) -> None:
        self.model, self.way, self.out = model, way, None

    def begin(self, ids_BW: Tensor, clock: Callable[[], float]) -> float:
        """Read the prompts; seconds."""
        begin = clock()
        with self.way():
            self.out = self.model(input_ids=ids_BW, use_cache=True, logits_to_keep=1)
        return clock() - begin

    def step(self, clock: Callable[[], float]) -> float:
        """Decode a token of every sequence; seconds."""
        out: Any = self.out
        token = out.logits[:, -1:].argmax(dim=-1)
        begin = clock()
        with self.way():
            self.out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return clock() - begin


@dataclass
class Turns:
    """Seconds of one contender: of every prompt, and of every step, those of one round after those of another."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@torch.inference_mode()
def take_turns(
    contenders: Mapping[str, Contender],
    prompts_RBW: Tensor,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Turns]:
    """Time several models in turn. The first round warms up and is not counted.

    Args:
        contenders: By name.
        prompts_RBW: Token ids of every round, the same for all.
        steps: Decode steps after each prompt.
        clock: Seconds.
        advance: Called after every round.
    """
    shuffled, found = random.Random(0), {name: Turns() for name in contenders}
    for number, ids_BW in enumerate(prompts_RBW):
        for name in shuffled.sample(list(contenders), len(contenders)):
            elapsed = contenders[name].begin(ids_BW, clock)
            if number:
                found[name].prefill.append(elapsed)
        for _ in range(steps if number else _WARM_UP_STEPS):
            for name in shuffled.sample(list(contenders), len(contenders)):
                elapsed = contenders[name].step(clock)
                if number:
                    found[name].decode.append(elapsed)
        advance()
    return found


def times_as_fast(base: Sequence[float], own: Sequence[float]) -> tuple[float, float]:
    """How many times as fast, of seconds of the same turns: the ratio of the minima, and the median of the ratios."""
    within = (other / mine for other, mine in zip(base, own, strict=True))
    return min(base) / min(own), statistics.median(within)


def median_speed(rounds: Sequence[Speed]) -> Speed:
    """Prefill and decode, each the median over rounds."""
    return Speed(statistics.median(r.prefill for r in rounds), statistics.median(r.decode for r in rounds))


def ratio(kind: str, rounds: Sequence[Speed], base: Sequence[Speed]) -> Ratio:
    """How many times as fast as ``base`` in the same rounds; ``kind``: ``prefill`` or ``decode``."""
    ratios = [getattr(one, kind) / getattr(other, kind) for one, other in zip(rounds, base, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
