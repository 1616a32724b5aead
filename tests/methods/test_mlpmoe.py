from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.inputs import SiteInputs
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.evaluate.proxy import proxy_change, proxy_perplexity
from moesaic.materialise.apply import apply_blueprint
from moesaic.materialise.pack import TENSOR_NAMES, pack
from moesaic.methods.mlpmoe.config import Config
from moesaic.methods.mlpmoe.method import plan_site
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.energy import branch_energies, neuron_norms
from moesaic.solvers.fade import fade_fractions
from tests.ffns import random_ffn, random_inputs, relative_error, sum_of_parts

ORDERS = ("contiguous", "strided", "norm-sorted")
FACTORS = ("sqrt", "energy", "ratio", "none", "per_channel", "oracle")


def plan_of(weights: FFNWeights, inputs: Tensor | None = None, seed: int = 0, **options: Any) -> LayerPlan:
    return plan_site(weights, None if inputs is None else SiteInputs(inputs), Config(**options), seed)


def packed(weights: FFNWeights, plan: LayerPlan) -> FFNWeights:
    """The converted FFN. Under the static router it is a dense FFN again."""
    tensors = pack(weights, plan)
    return FFNWeights(
        activation=weights.activation,
        **{field: tensors[name] for field, name in TENSOR_NAMES.items() if name in tensors},  # type: ignore[arg-type]
    )


def removed_fraction(weights: FFNWeights, plan: LayerPlan) -> float:
    """Zeros over parameters; neurons and branches that are gone are zeros."""
    left = sum(int(tensor.count_nonzero()) for tensor in packed(weights, plan).tensors().values())
    return 1 - left / sum(tensor.numel() for tensor in weights.tensors().values())


def scale_of(plan: LayerPlan) -> float:
    """c of a plan; for one per channel the mean."""
    return 1.0 if plan.expert_scale is None else float(plan.expert_scale[0].mean())


# --- slicing


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("branches", [1, 2, 7, 32, 37])
@pytest.mark.parametrize(("gated", "biases"), [(True, False), (True, True), (False, True)])
def test_branches_add_up_to_the_dense_ffn(order: str, branches: int, gated: bool, biases: bool) -> None:
    weights = random_ffn(37, gated=gated, biases=biases, activation="silu" if gated else "gelu_new")
    x_TD = random_inputs()
    plan = plan_of(weights, branches=branches, order=order)
    assert len(plan.experts) == branches
    assert relative_error(sum_of_parts(weights, plan, x_TD), weights(x_TD)) < 1e-12
    assert relative_error(packed(weights, plan)(x_TD), weights(x_TD)) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("branches", [1, 5, 37])
def test_slices_are_a_partition_whose_order_can_be_undone_bit_for_bit(order: str, branches: int) -> None:
    weights = random_ffn(37, biases=True, dtype=torch.bfloat16)
    plan = plan_of(weights, branches=branches, order=order)
    assert plan.is_partition
    moved = packed(weights, plan)
    back = moved.take(torch.argsort(plan.packed), keep_down_bias=True)
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    assert sum(t.numel() for t in moved.tensors().values()) == sum(t.numel() for t in weights.tensors().values())


def test_contiguous_slices_leave_the_tensors_as_they_are() -> None:
    weights = random_ffn(37)
    moved = packed(weights, plan_of(weights, branches=8))
    assert all(torch.equal(moved.tensors()[name], tensor) for name, tensor in weights.tensors().items())


def test_the_first_branches_take_the_remainder() -> None:
    weights = random_ffn(37)
    for order in ("contiguous", "strided"):
        widths = [len(expert) for expert in plan_of(weights, branches=8, order=order).experts]
        assert widths == [5, 5, 5, 5, 5, 4, 4, 4]
    strided = plan_of(weights, branches=8, order="strided").experts
    assert all(bool((expert % 8 == i).all()) for i, expert in enumerate(strided))


def test_norm_sorted_slices_fall_in_size_and_follow_a_permutation() -> None:
    weights = random_ffn(37)
    plan = plan_of(weights, branches=4, order="norm-sorted")
    assert weights.gate_FD is not None
    inner = weights.gate_FD.square().sum(1) + weights.up_FD.square().sum(1)
    score = weights.down_DF.square().sum(0).sqrt() * inner.sqrt()
    assert torch.equal(plan.packed, torch.argsort(score, descending=True))
    shuffle = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    moved = plan_of(weights.take(shuffle), branches=4, order="norm-sorted")
    assert torch.equal(shuffle[moved.packed], plan.packed)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 37), max_size=8), seed=st.integers(0, 99))
def test_any_partition_in_any_order_gives_the_same_sum(cuts: list[int], seed: int) -> None:
    weights, x_TD = random_ffn(37, biases=True), random_inputs()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
    experts = tuple(order.tensor_split(sorted(cuts)))
    plan = LayerPlan(37, torch.zeros(0, dtype=torch.long), experts, len(experts))
    assert relative_error(sum_of_parts(weights, plan, x_TD), weights(x_TD)) < 1e-12


@pytest.mark.parametrize("branches", [8, 16])
def test_the_output_bias_counts_once(branches: int) -> None:
    weights = random_ffn(37, gated=False, biases=True, activation="relu")
    assert weights.down_bias_D is not None
    assert weights.up_bias_F is not None
    silent = FFNWeights(
        weights.up_FD,
        weights.down_DF,
        "relu",
        up_bias_F=-100 * torch.ones(37).double(),
        down_bias_D=weights.down_bias_D,
    )
    y_TD = packed(silent, plan_of(silent, branches=branches))(random_inputs())
    assert torch.equal(y_TD, weights.down_bias_D.expand_as(y_TD))


def test_bf16_sum_of_branches_errs_by_the_rounding_of_its_terms() -> None:
    # relative to sqrt(sum |E_i|^2): branches may cancel, so |y| is no yardstick
    branches = 32
    weights, x_TD = random_ffn(640, 64), random_inputs(64, 64)
    exact = [weights.take(expert)(x_TD) for expert in plan_of(weights, branches=branches).experts]
    rounded = [y_TD.bfloat16() for y_TD in exact]
    in_fp32 = torch.stack(rounded).float().sum(0).bfloat16()
    in_bf16 = rounded[0]
    for y_TD in rounded[1:]:
        in_bf16 = in_bf16 + y_TD
    size_TD = torch.stack(exact).square().sum(0).sqrt()
    fp32_error, bf16_error = (
        float(((y_TD.double() - weights(x_TD)) / size_TD).square().mean().sqrt()) for y_TD in (in_fp32, in_bf16)
    )
    assert 2**-11 < fp32_error < 2**-8.5
    assert fp32_error < bf16_error < 2**-8 * math.sqrt(branches)


@pytest.mark.parametrize(
    ("options", "d_ff", "message"),
    [
        ({"branches": 38}, 37, "38 branches but the FFN has only 37 neurons"),
        ({"branches": 8, "strict": True}, 37, "8 branches do not divide the 37 neurons"),
    ],
)
def test_slices_that_do_not_fit_are_refused(options: dict[str, Any], d_ff: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**options).check(d_ff)
    with pytest.raises(InputError, match=message):
        plan_of(random_ffn(d_ff), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"branches": 4, "keep": 5},
        {"fade_min": 0.3, "fade_max": 0.2},
        {"prune_clip": (2.0, 1.0)},
        {"prune_clip": (0.0, 1.0)},
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Config(**options)


def test_strict_accepts_what_divides() -> None:
    Config(branches=8, strict=True).check(40)
    Config(branches=37).check(37)


# --- Fractal Fade


@pytest.mark.parametrize("order", ORDERS)
def test_weight_fade_zeroes_the_smallest_of_each_branch(order: str) -> None:
    weights = random_ffn(250, 64)
    plan = plan_of(weights, branches=8, order=order, fade_max=0.4)
    assert plan.fade is not None
    assert plan.fade.fractions == fade_fractions("linear", 8, 0.0, 0.4)
    faded = packed(weights, plan)
    start = 0
    for expert, fraction in zip(plan.experts, plan.fade.fractions, strict=True):
        rows = slice(start, start := start + len(expert))
        assert faded.gate_FD is not None
        for matrix in (faded.gate_FD[rows], faded.up_FD[rows], faded.down_DF[:, rows]):
            assert int((matrix == 0).sum()) == math.floor(fraction * matrix.numel())


def test_linear_fade_to_40_percent_removes_20_percent_less_the_flooring() -> None:
    weights = random_ffn(250, 64)
    removed = removed_fraction(weights, plan_of(weights, branches=8, fade_max=0.4))
    assert removed == pytest.approx(0.1984, abs=2e-4)  # the longer slices come first and lose less
    equal = random_ffn(256, 64)
    assert removed_fraction(equal, plan_of(equal, branches=8, fade_max=0.4)) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_fade_to_zero_is_the_identity(unit: str) -> None:
    weights = random_ffn()
    plan = plan_of(weights, branches=8, fade_max=0.0, fade_unit=unit)
    assert plan.is_partition
    assert removed_fraction(weights, plan) == 0


@pytest.mark.parametrize("gated", [True, False])
def test_neuron_fade_equals_the_masked_ffn_exactly(gated: bool) -> None:
    # small integers and relu: every sum is exact, whatever its order
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).double()

    weights = FFNWeights(integers(37, 8), integers(8, 37), "relu", integers(37, 8) if gated else None)
    plan = plan_of(weights, branches=5, fade_max=0.6, fade_unit="neuron")
    assert plan.fade is None
    widths = [len(expert) for expert in plan.experts]
    sizes = [8, 8, 7, 7, 7]
    fractions = fade_fractions("linear", 5, 0.0, 0.6)
    assert widths == [n - math.floor(s * n) for n, s in zip(sizes, fractions, strict=True)]
    alive = torch.zeros(37, 1).double()
    alive[plan.packed] = 1
    gate_FD = None if weights.gate_FD is None else weights.gate_FD * alive
    masked = FFNWeights(weights.up_FD * alive, weights.down_DF * alive.T, "relu", gate_FD)
    x_TD = integers(9, 8)
    assert torch.equal(packed(weights, plan)(x_TD), masked(x_TD))
    removed = 37 - len(plan.packed)
    assert removed_fraction(weights, plan) >= removed / 37 - 1e-12


def test_neuron_fade_removes_the_lowest_scores_of_each_branch() -> None:
    weights = random_ffn()
    assert weights.gate_FD is not None
    inner = weights.gate_FD.square().sum(1) + weights.up_FD.square().sum(1)
    score = weights.down_DF.square().sum(0) * inner
    dense = plan_of(weights, branches=5)
    faded = plan_of(weights, branches=5, fade_min=0.3, fade_max=0.5, fade_unit="neuron")
    for before, after in zip(dense.experts, faded.experts, strict=True):
        gone = torch.tensor(sorted(set(before.tolist()) - set(after.tolist())))
        assert len(gone) > 0
        assert score[gone].max() < score[after].min()
        assert torch.equal(after, after.sort().values)


# --- Compensated Pruning


@pytest.mark.parametrize("factor", FACTORS)
def test_keeping_every_branch_changes_nothing(factor: str) -> None:
    weights = random_ffn()
    plan = plan_of(weights, random_inputs(), branches=8, keep=8, prune_factor=factor)
    assert plan.is_partition
    assert plan.expert_scale is None


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("which", ["last", "low_energy", "strided", "random"])
def test_folding_c_into_the_weights_scales_the_kept_sum(factor: str, which: str) -> None:
    weights, x_TD = random_ffn(biases=True), random_inputs()
    plan = plan_of(weights, x_TD, branches=8, keep=5, prune_which=which, prune_factor=factor)
    assert len(plan.experts) == plan.top_k == 5
    assert weights.down_bias_D is not None
    kept_sum = sum_of_parts(weights, plan, x_TD) - weights.down_bias_D
    scale = torch.ones(5) if plan.expert_scale is None else plan.expert_scale
    assert bool((scale == scale[0]).all())  # one c for all branches
    expected = scale[0].double() * kept_sum + weights.down_bias_D
    assert relative_error(packed(weights, plan)(x_TD), expected) < 1e-12


def test_factors_on_a_real_split() -> None:
    weights, x_TD = random_ffn(40, biases=True), random_inputs(200)
    dense = weights(x_TD)

    def scale_and_error(factor: str) -> tuple[float, float]:
        plan = plan_of(weights, x_TD, branches=8, keep=5, prune_which="last", prune_factor=factor)
        error = float((packed(weights, plan)(x_TD) - dense).square().sum())
        return scale_of(plan), error

    results = {factor: scale_and_error(factor) for factor in FACTORS}
    assert results["sqrt"][0] == pytest.approx(math.sqrt(8 / 5))
    assert results["ratio"][0] == pytest.approx(8 / 5)
    assert results["none"][0] == 1.0
    assert all(
        results["oracle"][1] <= error + 1e-9 for _, error in results.values() if error != results["per_channel"][1]
    )
    unbiased = random_ffn(40)
    assert removed_fraction(unbiased, plan_of(unbiased, branches=8, keep=5, prune_which="last")) == pytest.approx(3 / 8)
    norms_F = neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF)
    energies = branch_energies(*norms_F, plan_of(weights, branches=8).experts)
    assert results["energy"][0] == pytest.approx(float((energies.sum() / energies[:5].sum()).sqrt()))


def test_low_energy_drops_the_planted_weak_branches() -> None:
    weights = random_ffn(40)
    weak = torch.ones(40).double()
    weak[5:10] = weak[30:35] = 0.01
    planted = FFNWeights(weights.up_FD, weights.down_DF * weak, weights.activation, weights.gate_FD)
    plan = plan_of(planted, branches=8, keep=6)
    assert sorted(plan.packed.tolist()) == [j for j in range(40) if weak[j] == 1]


def test_oracle_reads_inputs_and_nothing_else_does() -> None:
    assert Config(keep=5, prune_factor="oracle").needs_calibration()
    assert not Config(prune_factor="oracle").needs_calibration()
    assert not any(Config(keep=5, prune_factor=f).needs_calibration() for f in FACTORS if f != "oracle")
    with pytest.raises(InputError, match="needs calibration inputs"):
        plan_of(random_ffn(), branches=8, keep=5, prune_factor="oracle")


# --- both, and determinism


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_fade_and_prune_combine_branch_by_branch(unit: str) -> None:
    weights = random_ffn(40)
    fade = {"branches": 8, "fade_min": 0.1, "fade_max": 0.5, "fade_unit": unit}
    faded = plan_of(weights, **fade)
    both = plan_of(weights, **fade, keep=3, prune_which="strided")
    for position, branch in enumerate([0, 2, 5]):
        assert torch.equal(both.experts[position], faded.experts[branch])
        if unit == "weight":
            assert both.fade is not None
            assert faded.fade is not None
            assert both.fade.fractions[position] == faded.fade.fractions[branch]
    assert removed_fraction(weights, both) > 5 / 8


# --- the published figure


@pytest.mark.real
@pytest.mark.parametrize("order", ORDERS)
def test_slicing_a_real_model_changes_its_proxy_perplexity_by_less_than_published(order: str, smollm2: Path) -> None:
    checkpoint = Checkpoint(smollm2)
    anatomy = read_anatomy(checkpoint.config)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    dense = proxy_perplexity(model, tokenizer)
    sites = {
        site.path: plan_of(load_ffn(checkpoint, site, anatomy.activation), order=order, branches=32)
        for site in anatomy.sites
    }
    apply_blueprint(model, Blueprint("llama", checkpoint.fingerprint(), "mlpmoe", {}, sites), anatomy)
    assert abs(proxy_change(proxy_perplexity(model, tokenizer), dense).percent) < 0.05
