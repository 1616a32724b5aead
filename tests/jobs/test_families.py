"""Families that bring nothing new to what is computed: one conversion each, from end to end.

Methods and dtypes take turns, so that every family has one of each in some order and the suite stays short. What is
computed, read and written is tested with the other families (``tiny_models.FAMILIES``), each by each method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs.undo import undo
from tests.tiny_models import MORE_FAMILIES, PAD, build_tiny

METHODS = {
    "mlpmoe": {"branches": 5},  # 5 does not divide 37
    "cmoe": {"layout": "S2A3E5"},
    "token_clusters": {"split": "disjoint", "experts": 5, "active": 0.5, "refit": "none"},
    "neuron_experts": {"active": 0.3},
}
CASES = [
    (family, list(METHODS)[turn % len(METHODS)], ("bfloat16", "float32")[turn // 2 % 2])
    for turn, family in enumerate(MORE_FAMILIES)
]


@pytest.mark.parametrize(("family", "method", "dtype"), CASES)
def test_a_family_is_converted_runs_and_comes_back(family: str, method: str, dtype: str, tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source", dtype=dtype)
    out = tmp_path / "out"
    done = moesaic.convert(
        source,
        out,
        method=method,
        options=METHODS[method],
        calibration={"tokens": 256, "window": 64},
        target="moesaic",
    )
    assert all(plan.is_partition for plan in done.blueprint.sites.values())
    assert done.results["parity"]["all_on"] <= 1e-5
    assert done.results["parity"]["oracle"] <= 1e-5
    _runs(source, out)
    dense, back = Checkpoint(source), Checkpoint(undo(out, tmp_path / "dense"))
    assert set(dense.names) == set(back.names)
    assert all(torch.equal(dense.tensor(name), back.tensor(name)) for name in dense.names)


@torch.inference_mode()
def _runs(source: Path, out: Path) -> None:
    """All experts on is the dense model, and generation is the same with and without cache."""
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    model.exact_prefill(False)  # else all is a prompt without the cache
    generated = [model.generate(ids[:1, :5], use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*generated)
    model.all_experts_on()
    expected = dense(input_ids=ids, use_cache=False).logits
    difference = (model(input_ids=ids, use_cache=False).logits - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-5
