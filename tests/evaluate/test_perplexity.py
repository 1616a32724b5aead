"""Perplexity: the protocol, against closed forms and against transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.errors import InputError
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows


class Uniform:
    """A model that knows nothing."""

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))


def test_a_uniform_model_has_the_vocabulary_size() -> None:
    ids_NW = torch.randint(0, 50, (3, 300))
    result = perplexity(Uniform(), ids_NW, "ppl")
    assert result.value == pytest.approx(50, rel=1e-5)
    assert result.predicted == 3 * 299


def test_it_equals_the_models_own_loss(tiny: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    ids_NW = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        losses = [model(input_ids=ids_W[None], labels=ids_W[None]).loss.item() for ids_W in ids_NW]
    assert perplexity(model, ids_NW, "ppl").value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_windows_are_consecutive_and_the_tail_is_left_out(tiny: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    text = "The quick brown fox jumps over the lazy dog. " * 20
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids_NW = token_windows(tokenizer, text, 16, None)
    assert ids_NW.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert token_windows(tokenizer, text, 16, 2).shape == (2, 16)
    with pytest.raises(InputError, match="is empty"):
        token_windows(tokenizer, "", 8, None)
    with pytest.raises(InputError, match="a window has 100000"):
        token_windows(tokenizer, text, 100_000, None)
    for window, limit in ((1, None), (0, None), (16, 0)):
        with pytest.raises(InputError, match="predict nothing"):
            token_windows(tokenizer, text, window, limit)


def test_the_name_says_the_protocol() -> None:
    assert protocol_name("wikitext2-raw/test", 2048, None) == "ppl[wikitext2-raw/test w2048 n=all]"
    assert protocol_name("c4", 1024, 16) == "ppl[c4 w1024 n=16]"


def result(nll: list[float], name: str = "ppl") -> Perplexity:
    predicted = 10 * len(nll)
    return Perplexity(name, math.exp(sum(nll) / predicted), predicted, tuple(nll))


def test_comparison_is_paired() -> None:
    # Windows differ wildly, but the difference is the same in each: the interval has no width.
    dense = result([10.0, 50.0, 90.0, 20.0])
    worse = result([11.0, 51.0, 91.0, 21.0])
    ratio = compare(worse, dense)
    assert ratio.ratio == pytest.approx(math.exp(0.1))
    assert ratio.low == pytest.approx(ratio.high)
    mixed = compare(result([11.0, 49.0, 91.0, 19.0]), dense)
    assert mixed.low < 1 < mixed.high


@pytest.mark.parametrize("count", [4, 16])
def test_the_interval_covers_the_truth_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(0)
    dense = result([0.0] * count)
    drawn = [compare(result(list(10 * generator.normal(0.2, 0.1, count))), dense) for _ in range(1000)]
    covered = sum(ratio.low <= math.exp(0.2) <= ratio.high for ratio in drawn) / 1000
    assert 0.93 < covered < 0.97


def test_one_window_has_no_interval() -> None:
    ratio = compare(result([11.0]), result([10.0]))
    assert (ratio.low, ratio.high, ratio.shown(2)) == (None, None, "1.11")


def test_other_windows_are_not_compared() -> None:
    with pytest.raises(InputError, match="cannot compare"):
        compare(result([1.0], "a"), result([1.0], "b"))
    with pytest.raises(InputError, match="cannot compare"):
        compare(result([1.0, 2.0]), result([1.0]))
