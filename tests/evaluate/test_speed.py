"""Speed: every model in every round, the same prompts for all, ratios within a round."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.evaluate.speed import Ratio, Speed, measure, measure_rounds, median_speed, ratio
from tests.tiny_models import tiny_config


class Slowed(torch.nn.Module):
    """A model that takes a while, and remembers what it was asked."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        self.config = self.model.config
        self.seconds = seconds
        self.prompts: list[torch.Tensor] = []
        self.steps = 0

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        time.sleep(self.seconds)
        if "past_key_values" in options:
            self.steps += 1
        else:
            self.prompts.append(input_ids[0])
        return self.model(input_ids=input_ids, **options)


def test_every_round_gives_all_models_the_same_prompt_and_counts_after_the_first() -> None:
    fast, slow = Slowed(0.0), Slowed(0.05)
    prompts_RW = torch.arange(30).view(3, 10)
    found = measure_rounds({"fast": fast, "slow": slow}, prompts_RW, steps=5)
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    for model in (fast, slow):
        assert torch.equal(torch.stack(model.prompts), prompts_RW)
        assert model.steps == 4 + 2 * 5
    for kind in ("prefill", "decode"):
        assert ratio(kind, found["slow"], found["fast"]).high < 1
    assert all(speed.prefill <= 10 / 0.05 and speed.decode <= 1 / 0.05 for speed in found["slow"])


def test_medians_and_ratios() -> None:
    own = [Speed(10, 1), Speed(30, 4), Speed(20, 2)]
    base = [Speed(10, 1), Speed(10, 2), Speed(40, 4)]
    assert median_speed(own) == Speed(20, 2)
    assert ratio("prefill", own, base) == Ratio(1.0, 0.5, 3.0)
    assert ratio("decode", own, base) == Ratio(1.0, 0.5, 2.0)


def test_measure_reports_positive_medians() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    found = measure({"dense": model}, prompt=16, steps=2, rounds=1)
    assert found["dense"].prefill > 0
    assert found["dense"].to_dict().keys() == {"prefill", "decode"}
    with pytest.raises(KeyError):
        _ = found["model"]
