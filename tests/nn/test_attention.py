"""Pruned attention against the zero-masked dense model: families, implementations, cache, caps, causality.

Axes: B batch, T tokens, D model width, h head width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moesaic.anatomy.attention import attention_support, head_dim
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.model import Blueprint
from moesaic.errors import InputError
from moesaic.materialise.apply import apply_blueprint
from moesaic.nn.moesaic_attention import PrunedAttention, ValueMask
from tests.ffns import relative_error
from tests.nn.attention import (
    anatomy_of,
    attention_plans,
    dense_model,
    hook_masks,
    random_attention,
    value_mask,
)
from tests.tiny_models import PAD, PRUNES_PAIRS, PRUNES_VALUES, VOCAB, build_tiny

Tiny = Callable[[str], Path]
WINDOW = {"sliding_window": 8}


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def pruned_model(folder: Path, plans: dict[str, AttentionPlan], **options: Any) -> Any:
    model = dense_model(folder, **options)
    apply_blueprint(model, Blueprint("f", "s", "m", {}, {}, plans), anatomy_of(folder))
    return model


def masked_model(folder: Path, plans: dict[str, AttentionPlan], **options: Any) -> Any:
    model = dense_model(folder, **options)
    hook_masks(model, plans)
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*PRUNES_PAIRS, *PRUNES_VALUES])
def test_pruned_is_zero_masked(family: str, implementation: str, tiny: Tiny) -> None:
    if family in ("gemma2", "vaultgemma"):
        implementation = "eager"  # soft-capped scores: transformers has them in eager only
    plans, ids = attention_plans(tiny(family)), tokens(2, 24)
    options = {"attn_implementation": implementation}
    expected = logits(masked_model(tiny(family), plans, **options), ids)
    assert relative_error(logits(pruned_model(tiny(family), plans, **options), ids), expected) < 1e-5
    assert relative_error(logits(dense_model(tiny(family), **options), ids), expected) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sliding_window_is_carried(implementation: str, tmp_path: Path) -> None:
    folder = build_tiny("mistral", tmp_path / "dense", **WINDOW)
    plans, ids = attention_plans(folder), tokens(2, 24)
    model = pruned_model(folder, plans, attn_implementation=implementation)
    assert relative_error(logits(model, ids), logits(masked_model(folder, plans), ids)) < 1e-5
    far = ids.clone()
    far[:, 0] = ids[:, 0] + 1
    assert torch.equal(logits(model, far)[:, 20:], logits(model, ids)[:, 20:])


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_the_softmax_scale_is_that_of_the_full_head(family: str, tiny: Tiny) -> None:
    plans, ids = attention_plans(tiny(family), values=False), tokens(2, 24)
    expected = logits(masked_model(tiny(family), plans), ids)
    model = pruned_model(tiny(family), plans)
    assert relative_error(logits(model, ids), expected) < 1e-5
    for module in model.modules():
        if isinstance(module, PrunedAttention):
            module.scaling *= 2**0.5  # 1 / sqrt(h / 2): what a kernel would take from the narrower heads
    assert relative_error(logits(model, ids), expected) > 1e-3


def test_a_mask_of_whole_pairs_commutes_with_the_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BHTh = torch.randn(1, 2, 5, 8, generator=generator)
    angles_Th = torch.outer(torch.arange(5), 0.3 ** torch.arange(4)).repeat(1, 2)
    cos, sin = angles_Th.cos()[None], angles_Th.sin()[None]

    def rotate(x_BHTh: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x_BHTh, x_BHTh, cos, sin)[0]

    tied_h = torch.tensor([1.0, 0, 1, 0] * 2)
    assert torch.equal(rotate(x_BHTh * tied_h), rotate(x_BHTh) * tied_h)
    untied_h = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    assert relative_error(rotate(x_BHTh * untied_h), rotate(x_BHTh) * untied_h) > 0.1


def test_a_coordinate_that_is_always_off_may_as_well_have_no_weights(tiny: Tiny) -> None:
    (path, plan), *_ = attention_plans(tiny("llama"), pairs=None).items()
    decoder = torch.ones_like(plan.decoder)  # type: ignore[arg-type]
    decoder[3] = 0  # score 0 < threshold, and others are above it
    forced = AttentionPlan(8, None, plan.encoder, torch.zeros(6), torch.full((6,), 3.0), decoder, plan.embedding, 0.5)
    model, ids = pruned_model(tiny("llama"), {path: forced}), tokens(2, 24)
    expected = logits(model, ids)
    attention = model.get_submodule(path)
    with torch.no_grad():
        attention.v_proj.weight.view(2, 8, -1)[:, 3] = 0
        attention.o_proj.weight.view(-1, 4, 8)[..., 3] = 0
    assert torch.equal(logits(model, ids), expected)
    with torch.no_grad():
        attention.v_proj.weight.view(2, 8, -1)[:, 4] = 0
    assert relative_error(logits(model, ids), expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_causal_and_independent_of_the_batch(family: str, tiny: Tiny) -> None:
    model, ids = pruned_model(tiny(family), attention_plans(tiny(family))), tokens(3, 24)
    whole = logits(model, ids)
    changed = ids.clone()
    changed[:, 12] = ids[:, 12] + 1
    assert torch.equal(logits(model, changed)[:, :12], whole[:, :12])
    assert not torch.equal(logits(model, changed)[:, 12:], whole[:, 12:])
    for row in range(3):
        assert relative_error(logits(model, ids[row : row + 1]), whole[row : row + 1]) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_decoding_with_a_cache_is_the_full_forward(family: str, implementation: str, tiny: Tiny) -> None:
    plans = attention_plans(tiny(family))
    model, ids = pruned_model(tiny(family), plans, attn_implementation=implementation), tokens(2, 24)
    expected = logits(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids[:, :15], use_cache=True)
        parts = [out.logits]
        for t in range(15, 24):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert relative_error(torch.cat(parts, dim=1), expected) < 1e-5
    width = head_dim(anatomy_of(tiny(family)))
    narrow = width // 2 if attention_support(anatomy_of(tiny(family))).pairs is None else width
    for layer in out.past_key_values.layers:
        assert layer.keys.shape[-1] == narrow
        assert layer.values.shape[-1] == width


def test_generation_with_padding_and_a_static_cache(tiny: Tiny) -> None:
    model = pruned_model(tiny("llama"), attention_plans(tiny("llama")))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    short = tokens(1, 6)
    batch = torch.cat([torch.cat([torch.full((1, 3), PAD), short], dim=1), tokens(1, 9)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
    assert torch.equal(model.generate(batch, attention_mask=mask, **options)[0, 9:], alone[0, 6:])
    static = model.generate(short, attention_mask=torch.ones_like(short), cache_implementation="static", **options)
    assert torch.equal(static, alone)


@pytest.mark.parametrize("cap", [None, 1, 3, 8])
def test_the_mask_keeps_at_most_cap_coordinates_and_at_least_one(cap: int | None) -> None:
    plan = random_attention(8, 16, threshold=1.5, cap=cap)
    module = ValueMask(plan.spec(), 16)
    module.load_state_dict({name: tensor for name, tensor in plan.tensors().items() if name != "pairs"})
    x_BTD = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mask_BTh = module(x_BTD)
        free_BTh = module.scores(x_BTD) > plan.threshold
    count_BT = mask_BTh.sum(-1)
    assert count_BT.min() == 1
    assert count_BT.max() <= (cap or 8)
    assert cap in (None, 8) or bool(((free_BTh.sum(-1) > cap) & (count_BT == cap)).any())
    assert ((free_BTh.sum(-1) == 0) & (count_BT == 1)).any()  # one that had none
    below_BT = (free_BTh.sum(-1) >= 1) & (free_BTh.sum(-1) <= (cap or 8))
    assert torch.equal(mask_BTh[below_BT].bool(), free_BTh[below_BT])
    expected = torch.stack([value_mask(plan, x_D) for x_D in x_BTD.flatten(0, 1)]).view_as(mask_BTh)
    assert torch.equal(mask_BTh, expected)


def test_bf16_leaves_the_predictor_and_its_decisions_in_fp32(tiny: Tiny) -> None:
    plans = attention_plans(tiny("llama"))
    model = pruned_model(tiny("llama"), plans).to(torch.bfloat16)
    for path, plan in plans.items():
        mask: Any = model.get_submodule(path).value_mask
        assert torch.equal(mask.decoder, plan.decoder)
        assert model.get_submodule(path).q_proj.weight.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mask.scores(torch.randn(1, 3, 32)).dtype == torch.float32
    assert logits(model, tokens(1, 9)).isfinite().all()


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("qwen3", {"pairs": 2, "values": False}, "norms queries and keys"),
        ("phi3", {"values": True}, "attention of phi3 has not the four projections"),
        ("gpt2", {"values": True}, "attention of gpt2"),
    ],
)
def test_what_cannot_be_pruned_is_refused(family: str, plan: dict[str, Any], words: str, tiny: Tiny) -> None:
    anatomy = anatomy_of(tiny(family))
    width = 16 if family == "qwen3" else 8
    path = f"{anatomy.layer_path(0)}.self_attn"
    blueprint = Blueprint("f", "s", "m", {}, {}, {path: random_attention(width, 32, **plan)})
    with pytest.raises(InputError, match=words):
        apply_blueprint(dense_model(tiny(family)), blueprint, anatomy)


def test_partial_rotation_and_other_widths_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    partial = build_tiny("llama", tmp_path / "partial", rope_parameters=rope)
    assert "partial_rotary_factor is 0.5" in (attention_support(anatomy_of(partial)).pairs or "")
    plans = {"model.layers.0.self_attn": random_attention(16, 32)}
    with pytest.raises(InputError, match="heads of 16, the model's have 8"):
        pruned_model(tiny("llama"), plans)
    with pytest.raises(InputError, match="no attention of this model"):
        pruned_model(tiny("llama"), {"model.layers.7.self_attn": random_attention(8, 32)})
