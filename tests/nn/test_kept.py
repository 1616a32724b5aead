"""What is computed once from a module's tensors: when it holds, and that it travels with nothing.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.materialise.apply import build_ffn
from moesaic.nn.moesaic_kept import FEW, kept
from moesaic.nn.moesaic_low_bit import LowBitRouter
from moesaic.nn.moesaic_nested import NestedFeedForward
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from tests.ffns import random_ffn, random_inputs
from tests.nn.plans import neuron_plan


def neurons(seed: int = 0) -> NeuronFeedForward:
    weights = random_ffn(37, dtype=torch.float32, seed=seed)
    ffn = build_ffn(weights, neuron_plan(weights))
    assert isinstance(ffn, NeuronFeedForward)
    return ffn


def found(router: LowBitRouter, tokens: int = 1) -> Tensor:
    return kept(router, "up", tokens, lambda: router.matrix("up"))


def in_place(router: LowBitRouter) -> None:
    router.up_codes.zero_()


def registered(router: LowBitRouter) -> None:
    router.register_buffer("up_codes", router.up_codes.flip(0))


def other_memory(router: LowBitRouter) -> None:
    router.up_codes.data = router.up_codes.data.flip(0)


def loaded(router: LowBitRouter) -> None:
    router.load_state_dict(neurons(seed=1).low_bit.state_dict())


def assigned(router: LowBitRouter) -> None:
    router.load_state_dict(neurons(seed=1).low_bit.state_dict(), assign=True)


def emptied(router: LowBitRouter) -> None:
    router.to_empty(device="cpu")
    loaded(router)


CHANGES = (in_place, registered, other_memory, loaded, assigned, emptied)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_made_once_and_again_when_a_tensor_changes(change: Callable[[LowBitRouter], None]) -> None:
    router = neurons().low_bit
    made = found(router)
    assert found(router) is made
    assert found(router, FEW + 1) is made  # it is there
    change(router)
    assert found(router) is not made
    assert torch.equal(found(router), router.matrix("up"))
    assert not torch.equal(found(router), made)


def test_many_tokens_and_training_keep_nothing() -> None:
    router = neurons().low_bit
    assert found(router, FEW + 1) is not found(router, FEW + 1)
    made = found(router)
    assert found(router.train()) is not made
    assert found(router.eval()) is not made


@torch.no_grad()
def test_scores_are_the_same_bit_for_bit() -> None:
    ffn, x_TD = neurons(), random_inputs(5, dtype=torch.float32)
    anew_TF = ffn.train().scores(x_TD)
    ffn.eval()
    for _ in range(2):
        assert torch.equal(ffn.scores(x_TD), anew_TF)


def test_it_travels_with_no_copy_and_goes_with_the_module() -> None:
    ffn = neurons()
    names, size = ffn.state_dict().keys(), len(pickle.dumps(ffn))
    gone = weakref.ref(found(ffn.low_bit))
    assert ffn.state_dict().keys() == names
    assert len(pickle.dumps(ffn)) == size
    for other in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn))):
        assert torch.equal(found(other.low_bit), other.low_bit.matrix("up"))
        assert found(other.low_bit) is not gone()
    del ffn
    gc.collect()
    assert gone() is None


def test_decoded_int8_weights_are_kept_by_dtype_and_follow_their_codes() -> None:
    weights = random_ffn(37, biases=True, dtype=torch.bfloat16)
    ffn = build_ffn(weights, neuron_plan(weights, int8=True))
    assert isinstance(ffn, NestedFeedForward)
    x_TD = random_inputs(3, dtype=torch.bfloat16)
    made = ffn.matrices_for(x_TD)
    assert ffn.matrices_for(x_TD).up_PD is made.up_PD
    assert ffn.matrices_for(x_TD.float()).up_PD.dtype == torch.float32
    ffn.rest.codes.zero_()
    assert not torch.equal(ffn.matrices_for(x_TD).down_DP, made.down_DP)
    assert not ffn.matrices_for(x_TD).down_DP.any()
    ffn.gate_proj.bias.data.zero_()
    assert not ffn.matrices_for(x_TD).gate_bias_P.any()


def test_what_is_kept_in_inference_serves_training_too() -> None:
    ffn, x_TD = neurons(), random_inputs(3, dtype=torch.float32)
    with torch.inference_mode():
        ffn(x_TD)
        assert not found(ffn.low_bit).is_inference()
    ffn(x_TD.requires_grad_()).sum().backward()
    assert x_TD.grad is not None
    assert not found(ffn.low_bit).requires_grad
