"""Decisions become weights: packing is exact, and what is built computes what the oracle says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moesaic.anatomy import FAMILIES as FAMILIES_BY_TYPE
from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.layer import LayerPlan, Router, WeightFade
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.materialise.apply import apply_blueprint, build_ffn, ffn_of_model
from moesaic.materialise.pack import dense_tensors, pack, site_spec, unpack
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.modeling_moesaic import MoEFeedForward
from moesaic.nn.reference import reference_ffn
from tests.tiny_models import FAMILIES, MOE_FAMILIES, MOE_VARIANTS, VARIANTS, build_tiny

D = 8


def random_ffn(d_ff: int, *, gated: bool = True, biases: bool = True, dtype: torch.dtype = torch.float32) -> FFNWeights:
    generator = torch.Generator().manual_seed(d_ff)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return FFNWeights(
        up_FD=draw(d_ff, D),
        down_DF=draw(D, d_ff),
        activation="silu" if gated else "gelu",
        gate_FD=draw(d_ff, D) if gated else None,
        gate_bias_F=draw(d_ff) if gated and biases else None,
        up_bias_F=draw(d_ff) if biases else None,
        down_bias_D=draw(D) if biases else None,
    )


def random_partition(d_ff: int, shared: int, experts: int, seed: int = 0, top_k: int = 1) -> LayerPlan:
    """A shuffled partition with a linear router; experts padded to one width."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(d_ff, generator=generator)
    parts = torch.tensor_split(order[shared:], experts)
    width = max(len(part) for part in parts)
    padded = tuple(torch.cat([part, part.new_full((width - len(part),), -1)]) for part in parts)
    router = Router("linear", {"weight": torch.randn(experts, D, generator=generator, dtype=torch.float64)})
    return LayerPlan(d_ff, order[:shared], padded, top_k, router)


def partition_case(draw: st.DrawFn) -> tuple[FFNWeights, LayerPlan]:
    d_ff = draw(st.integers(2, 41))
    shared = draw(st.integers(0, d_ff - 1))
    experts = draw(st.integers(1, min(6, d_ff - shared)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    weights = random_ffn(d_ff, gated=draw(st.booleans()), biases=draw(st.booleans()), dtype=dtype)
    return weights, random_partition(d_ff, shared, experts, draw(st.integers(0, 99)))


partitions = st.composite(partition_case)()


@settings(max_examples=40, deadline=None)
@given(partitions)
def test_partition_packs_and_unpacks_bit_for_bit(case: tuple[FFNWeights, LayerPlan]) -> None:
    weights, plan = case
    back = unpack(pack(weights, plan), plan, weights.activation)
    assert back.tensors().keys() == weights.tensors().keys()
    for name, tensor in weights.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        assert torch.equal(back.tensors()[name], tensor)


@settings(max_examples=40, deadline=None)
@given(partitions)
def test_padding_is_zero_and_every_other_row_is_a_dense_one(case: tuple[FFNWeights, LayerPlan]) -> None:
    weights, plan = case
    tensors = pack(weights, plan)
    for row, neuron in enumerate(plan.packed.tolist()):
        down_D, up_D = tensors["down_proj.weight"][:, row], tensors["up_proj.weight"][row]
        if neuron < 0:
            assert not up_D.any()
            assert not down_D.any()
            assert "up_proj.bias" not in tensors or tensors["up_proj.bias"][row] == 0
        else:
            assert torch.equal(up_D, weights.up_FD[neuron])
            assert torch.equal(down_D, weights.down_DF[:, neuron])


@settings(max_examples=40, deadline=None)
@given(partitions)
def test_tensors_are_those_that_the_spec_asks_for(case: tuple[FFNWeights, LayerPlan]) -> None:
    weights, plan = case
    tensors = pack(weights, plan)
    module = MoEFeedForward(json.loads(json.dumps(site_spec(weights, plan))), D, weights.activation)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    assert tensors["router.weight"].dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(max_examples=30, deadline=None)
@given(partitions)
def test_all_experts_on_is_the_dense_network(case: tuple[FFNWeights, LayerPlan]) -> None:
    weights, plan = case[0].to(torch.float64), case[1]
    module = build_ffn(weights, plan)
    module.all_experts_on = True
    x_TD = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = weights(x_TD)
    assert (module(x_TD) - expected).abs().max() <= 1e-12 * expected.abs().max()


def _generated(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


F_, S, E = 23, 5, 4
GATED_ROUTER = Router(
    "gated",
    {"up": _generated(E, D), "gate": _generated(E, D, seed=8), "up_bias": _generated(E), "gate_bias": _generated(E)},
)
P = S + E * 5  # 18 routed neurons in experts of 5, two of them padding
PLANS = {
    "plain": {},
    "gated router": {"router": GATED_ROUTER},
    "ungated router, normalised": {"router": Router("gated", {"up": _generated(E, D)}, normalise_input=True)},
    "softmax over the chosen": {"gate": "softmax_topk"},
    "scaled": {"gate": "scaled", "gate_scale": _generated(E), "selection_bias": 0.1 * _generated(E)},
    "scaled, no scale given": {"gate": "scaled"},
    "fade": {"fade": WeightFade((0.0, 0.3, 0.5, 1.0))},
    "fade by row": {"fade": WeightFade((0.2, 0.3, 0.5, 0.9), "row")},
    "fade by branch": {"fade": WeightFade((0.2, 0.3, 0.5, 0.9), "branch")},
    "scaled experts": {"expert_scale": torch.tensor([1.0, 2.0, 0.5, 1.5])},
    "scaled channels": {"expert_scale": _generated(E, D)},
    "readout": {"readout": _generated(D, P)},
    "bias": {"bias": _generated(D)},
    "everything": {
        "fade": WeightFade((0.2, 0.3, 0.5, 0.9), "branch"),
        "expert_scale": _generated(E, D),
        "readout": _generated(D, P),
        "bias": _generated(D),
        "gate": "scaled",
        "gate_scale": _generated(E),
    },
}


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS.keys())
def test_module_computes_what_the_oracle_says(changes: dict, gated: bool, biases: bool) -> None:
    weights = random_ffn(F_, gated=gated, biases=biases, dtype=torch.float64)
    base = random_partition(F_, S, E, top_k=2)
    plan = LayerPlan(**{**base.__dict__, **changes})
    module = build_ffn(weights, plan)
    x_TD = _generated(9, D).double()
    expected = reference_ffn(weights, plan, x_TD)
    assert (module(x_TD) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert plan.bias is None or torch.equal(pack(weights, plan)["down_proj.bias"], plan.bias.double())


def test_static_experts_of_different_widths() -> None:
    weights = random_ffn(F_, dtype=torch.float64)
    plan = LayerPlan(
        F_, torch.arange(0), tuple(torch.arange(F_).split([3, 9, 11])), 3, fade=WeightFade((0.0, 0.25, 0.5))
    )
    x_TD = _generated(9, D).double()
    expected = reference_ffn(weights, plan, x_TD)
    assert (build_ffn(weights, plan)(x_TD) - expected).abs().max() <= 1e-12 * expected.abs().max()
    removed = (pack(weights, plan)["up_proj.weight"] == 0).sum()
    assert removed == int(0.25 * 9 * D) + int(0.5 * 11 * D)


def test_overlapping_experts_hold_a_neuron_each() -> None:
    weights = random_ffn(6)
    plan = LayerPlan(6, torch.tensor([0]), (torch.tensor([1, 2]), torch.tensor([2, 3])), 1, Router("linear", {}))
    tensors = pack(weights, plan)
    assert torch.equal(tensors["up_proj.weight"][2], tensors["up_proj.weight"][3])


def test_router_stays_fp32_beside_bf16_weights() -> None:
    weights, plan = random_ffn(F_, dtype=torch.bfloat16), random_partition(F_, S, E)
    module = build_ffn(weights, plan)
    assert {name: p.dtype for name, p in module.named_parameters() if "router" in name} == {
        "router.weight": torch.float32
    }
    assert module.up_proj.weight.dtype == torch.bfloat16


def test_packed_tensors_are_new_memory() -> None:
    weights = random_ffn(F_)
    plan = random_partition(F_, S, E)
    before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
    router_before = plan.router.tensors["weight"].clone()
    for tensor in pack(weights, plan).values():
        tensor.zero_()
    assert all(torch.equal(weights.tensors()[name], tensor) for name, tensor in before.items())
    assert torch.equal(plan.router.tensors["weight"], router_before)


def test_plan_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match="for an FFN of 23 neurons, this one has 24"):
        pack(random_ffn(24), random_partition(F_, S, E))


# -- whole models ----------------------------------------------------------------------------------------------------


def anatomy_of(folder: Path) -> Anatomy:
    config = Checkpoint(folder).config
    return read_anatomy(config, hierarchical=FAMILIES_BY_TYPE[config["model_type"]].moe is not None)


def blueprint_for(folder: Path, shared: int = 5, experts: int = 4) -> Blueprint:
    anatomy = anatomy_of(folder)
    sites = {}
    for number, site in enumerate(anatomy.sites):
        plan = random_partition(site.d_ff, shared, experts, seed=number)
        router = Router("linear", {"weight": _generated(experts, anatomy.d_model)})
        sites[site.path] = LayerPlan(site.d_ff, plan.shared, plan.experts, 2, router)
    return Blueprint(anatomy.family.name, "", "test", {}, sites)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, *MOE_FAMILIES, *MOE_VARIANTS])
def test_converted_model_with_all_experts_on_is_the_dense_one(family: str, tiny: Callable[[str], Path]) -> None:
    folder = tiny(family)
    anatomy = anatomy_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(2 * 13).view(2, 13) * 7 % 300
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        apply_blueprint(model, blueprint_for(folder), anatomy)
        routed = model(input_ids=ids).logits
        modules = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
        assert len(modules) == len(anatomy.sites)
        for module in modules:
            module.all_experts_on = True
        all_on = model(input_ids=ids).logits
    assert (all_on - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (routed - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, *MOE_FAMILIES, *MOE_VARIANTS])
def test_dense_tensors_are_those_on_disk(family: str, tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny(family))
    anatomy = anatomy_of(checkpoint.folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    for site in anatomy.sites:
        for weights in (load_ffn(checkpoint, site, anatomy.activation), ffn_of_model(model, site, anatomy.activation)):
            tensors = dense_tensors(weights, site)
            assert tensors.keys() == ffn_tensor_names(checkpoint, site)
            for name, tensor in tensors.items():
                stored = checkpoint.tensor(name)
                assert torch.equal(tensor, stored[site.expert] if site.names.stacked else stored), name


def test_blueprint_of_another_model_is_refused(tiny: Callable[[str], Path]) -> None:
    folder = tiny("llama")
    anatomy = read_anatomy(Checkpoint(folder).config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plan = random_partition(37, 5, 4)
    with pytest.raises(InputError, match=r"model\.layers\.9\.mlp, which this model does not have"):
        apply_blueprint(model, Blueprint("llama", "", "", {}, {"model.layers.9.mlp": plan}), anatomy)
    wrong = random_partition(38, 5, 4)
    with pytest.raises(InputError, match="38 neurons, this one has 37"):
        apply_blueprint(model, Blueprint("llama", "", "", {}, {"model.layers.0.mlp": wrong}), anatomy)


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        ({"up_FD": torch.zeros(3, 16)}, r"up_FD has shape \[3, 16\], this FFN needs \[37, 16\]"),
        ({"gate_bias_F": torch.zeros(37)}, "gate_bias_F, which this FFN does not have"),
        ({"down_DF": torch.zeros(16, 37)}, "down_DF"),
    ],
)
def test_trained_neurons_of_another_form_are_refused(projections: dict[str, torch.Tensor], message: str) -> None:
    weights = FFNWeights(torch.ones(37, 16), torch.ones(16, 37), "silu")
    plan = LayerPlan(37, torch.arange(37), projections=projections)
    with pytest.raises(InputError, match=message):
        pack(weights, plan)


def test_experts_of_a_block_keep_their_places_and_are_all_named(tmp_path: Path) -> None:
    folder = build_tiny("qwen3_moe", tmp_path / "model", d_ff=8, num_experts=104)
    anatomy = anatomy_of(folder)
    whole = {site.path: LayerPlan(site.d_ff, torch.arange(site.d_ff)) for site in anatomy.sites}
    by_name = Blueprint("qwen3_moe", "", "test", {}, dict(sorted(whole.items())))  # 0, 1, 10, 100, 101, ...
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(13)[None] * 7
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        apply_blueprint(model, by_name, anatomy)
        assert (model(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    whole.pop(anatomy.sites[0].path)
    with pytest.raises(InputError, match="names 103 of the 104 experts"):
        apply_blueprint(AutoModelForCausalLM.from_pretrained(folder), replace(by_name, sites=whole), anatomy)
