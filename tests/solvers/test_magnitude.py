from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.solvers.magnitude import Scope, fade_branch, smallest
from tests.ffns import random_ffn


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    levels=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_smallest_marks_the_exact_count_and_nothing_larger_than_what_stays(
    rows: int, width: int, share: float, levels: int, dtype: torch.dtype, seed: int
) -> None:
    # few levels: most magnitudes are tied
    values = torch.randint(-levels, levels + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).to(dtype)
    count = math.floor(share * width)
    mask = smallest(values, count)
    assert mask.sum(dim=1).tolist() == [count] * rows
    for row, chosen in zip(values.abs().double(), mask, strict=True):
        if 0 < count < width:
            assert row[chosen].max() <= row[~chosen].min()
            tied = torch.nonzero(row == row[chosen].max()).flatten()
            inside = chosen[tied]
            assert torch.equal(inside, inside.sort(descending=True).values)  # of equal ones the earlier go


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scope", ["matrix", "row", "branch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.0, 0.13, 0.4, 0.99])
def test_zeros_per_scope_are_the_floor_and_the_rest_is_untouched(
    gated: bool, scope: Scope, dtype: torch.dtype, fraction: float
) -> None:
    weights = random_ffn(d_ff=13, d_model=10, gated=gated, dtype=dtype)
    before = [m for m in (weights.gate_FD, weights.up_FD, weights.down_DF) if m is not None]
    gate, up, down = fade_branch(weights.gate_FD, weights.up_FD, weights.down_DF, fraction, scope)
    after = [m for m in (gate, up, down) if m is not None]
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert new.dtype == dtype
        assert torch.equal(new[new != 0], old[new != 0])
        assert not torch.equal(new, old) or fraction == 0 or scope == "branch"
        if scope == "matrix":
            assert int((new == 0).sum()) == math.floor(fraction * old.numel())
        if scope == "row":
            assert (new == 0).sum(dim=1).tolist() == [math.floor(fraction * old.shape[1])] * len(old)
    if scope == "branch":
        numel = sum(m.numel() for m in before)
        assert sum(int((m == 0).sum()) for m in after) == math.floor(fraction * numel)
        removed = torch.cat([old[new == 0].abs() for old, new in zip(before, after, strict=True)])
        kept = torch.cat([new[new != 0].abs() for new in after])
        assert fraction == 0 or removed.max() <= kept.min()


@pytest.mark.parametrize("scope", ["matrix", "row", "branch"])
def test_fade_twice_is_fade_once_and_inputs_are_not_written(scope: Scope) -> None:
    weights = random_ffn(d_ff=9, d_model=7, dtype=torch.bfloat16)
    copies = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    once = fade_branch(weights.gate_FD, weights.up_FD, weights.down_DF, 0.3, scope)
    twice = fade_branch(*once, 0.3, scope)
    for first, second in zip(once, twice, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in weights.tensors().items())


@pytest.mark.parametrize("scope", ["matrix", "row", "branch"])
@pytest.mark.parametrize("gated", [True, False])
def test_padding_neither_counts_nor_competes(scope: Scope, gated: bool) -> None:
    weights = random_ffn(d_ff=12, d_model=8, gated=gated)
    index = torch.tensor([3, -1, 7, 7, 0, -1])  # a neuron may stand twice
    real = index >= 0
    padded, plain = weights.take(index), weights.take(index[real])
    expected = fade_branch(plain.gate_FD, plain.up_FD, plain.down_DF, 0.5, scope)
    gate, up, down = fade_branch(padded.gate_FD, padded.up_FD, padded.down_DF, 0.5, scope, real)
    assert expected[1] is not None
    assert torch.equal(up[real], expected[1])
    assert torch.equal(down[:, real], expected[2])
    assert not up[~real].any()
    assert not down[:, ~real].any()
    if gate is None:
        assert not gated
    else:
        assert expected[0] is not None
        assert torch.equal(gate[real], expected[0])
        assert not gate[~real].any()
