"""Adapters on the projections that the runtime slices: they count, once per forward pass, or are refused.

Axes: T tokens, D model width, P packed neurons, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moesaic.blueprint.layer import LayerPlan
from moesaic.materialise.apply import build_ffn
from moesaic.materialise.pack import pack
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_side_by_side import lies
from tests.ffns import random_ffn, random_inputs, relative_error
from tests.nn.folders import convert_by_hand
from tests.nn.plans import as_union, plan_of, random_members, random_plan
from tests.nn.test_paths import routed_paths

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PATHS = [name for name in routed_paths("packed") if name in routed_paths("union")]


class LowRank(nn.Module):
    """W + B A, counting how often it is computed."""

    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows, columns = weight.shape
        self.a = nn.Parameter(0.2 * torch.randn(2, columns, generator=generator, dtype=weight.dtype))
        self.b = nn.Parameter(0.2 * torch.randn(rows, 2, generator=generator, dtype=weight.dtype))
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight + self.b @ self.a


def adapted(module: MoEFeedForward) -> dict[str, LowRank]:
    """Parametrise the three projections of a module."""
    adapters = {}
    for seed, name in enumerate(PROJECTIONS):
        linear: Any = getattr(module, name)
        adapters[name] = LowRank(linear.weight.detach(), seed)
        parametrize.register_parametrization(linear, "weight", adapters[name], unsafe=True)
    return adapters


def plans() -> tuple[LayerPlan, LayerPlan]:
    weights = random_ffn(37)
    return random_plan(weights, "S2A2E7"), as_union(plan_of(random_members(4, 37, 0.5), torch.arange(5), 2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [0, 1])
def test_parametrised_projections_count_and_are_computed_once(kind: int, path: str) -> None:
    weights, plan, x_TD = random_ffn(37), plans()[kind], random_inputs(30)
    module = build_ffn(weights, plan)
    module.asked = (path,)
    before_TD = module(x_TD).detach()
    adapters = adapted(module)
    for adapter in adapters.values():
        adapter.calls = 0
    y_TD = module(x_TD)
    assert [adapter.calls for adapter in adapters.values()] == [1, 1, 1]
    y_TD.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for a in adapters.values() for p in a.parameters())

    merged = build_ffn(weights, plan)
    state = pack(weights, plan)
    with torch.no_grad():
        state |= {f"{name}.weight": getattr(module, name).weight for name in PROJECTIONS}
        merged.load_state_dict(state)
        assert relative_error(y_TD, merged(x_TD)) < 1e-12
        assert relative_error(before_TD, merged(x_TD)) > 1e-2
        assert relative_error(module.expert(1, x_TD), merged.expert(1, x_TD)) < 1e-12


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Any:
    from moesaic.nn.modeling_moesaic import MoesaicForCausalLM

    folder = convert_by_hand("llama", tiny("llama"), tmp_path / "out", layout="S1A2E5", router="linear")
    return MoesaicForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    names = [*PROJECTIONS, "q_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options)).eval()


def test_lora_of_peft_counts_trains_switches_off_and_merges(model: Any) -> None:
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        dense = model(ids).logits
    tuned = lora(model)
    logits = tuned(ids).logits
    assert relative_error(logits, dense) > 1e-2
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert sum(".mlp." in name for name in gradients) == 2 * 3 * 2  # layers, projections, A and B
    assert all(grad is not None and bool(grad.any()) for grad in gradients.values())
    with torch.no_grad(), tuned.disable_adapter():
        assert relative_error(tuned(ids).logits, dense) < 1e-5  # a wrapped layer takes torch's path
    merged = tuned.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    with torch.no_grad():
        assert relative_error(merged(ids).logits, logits) < 1e-5


def test_merged_adapters_can_be_switched_off(model: Any) -> None:
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        dense = model(ids).logits
        tuned = lora(model)
        tuned.merge_adapter()
        with tuned.disable_adapter():
            assert relative_error(tuned(ids).logits, dense) < 1e-5


def test_adapters_by_sequence_are_refused(model: Any) -> None:
    tuned = lora(model)
    tuned.add_adapter("other", LoraConfig(r=2, target_modules=list(PROJECTIONS), init_lora_weights=False))
    with pytest.raises(TypeError, match="adapter_names"):
        tuned(torch.arange(2, 22).reshape(2, 10), adapter_names=["default", "other"])


def test_weights_that_the_kernel_has_run_are_saved_as_matrices_though_wrapped_since(model: Any) -> None:
    with torch.no_grad():
        model(torch.arange(2, 3)[None])
    assert lies(model.model.layers[0].mlp)
    state = lora(model).state_dict()
    matrices = [state[f"base_model.model.model.layers.0.mlp.{name}.base_layer.weight"] for name in PROJECTIONS]
    assert all(matrix.is_contiguous() for matrix in matrices)
    assert len({matrix.untyped_storage().data_ptr() for matrix in matrices}) == 3


def test_lora_on_the_experts_alone_is_not_ignored(model: Any) -> None:
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        dense = model(ids).logits
        for name in PROJECTIONS:
            tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[name], init_lora_weights=False)).eval()
            assert relative_error(tuned(ids).logits, dense) > 1e-3, name
            tuned.unload()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_are_no_plain_matrix_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="only plain LoRA"):
        lora(model, **options)(torch.arange(2, 9)[None])


def test_unknown_wrappers_are_refused(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(TypeError, match=r"Sequential in place of nn\.Linear"):
        model(torch.arange(2, 9)[None])
