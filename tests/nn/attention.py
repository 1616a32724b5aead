"""Random plans for attention, and their oracle: the dense model with zero masks hooked into it.

Axes: B batch, T tokens, D model width, H heads, h head width, P kept pairs, R width of the predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.attention import attention_path, attention_support, head_dim
from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.attention import AttentionPlan
from moesaic.checkpoint.reader import Checkpoint

RANK = 6


def random_attention(
    width: int,
    d_model: int,
    seed: int = 0,
    *,
    pairs: int | None = None,
    values: bool = True,
    threshold: float = 0.2,
    cap: int | None = None,
) -> AttentionPlan:
    """A plan that keeps ``pairs`` random rotary pairs, and masks values by a random predictor."""
    generator = torch.Generator().manual_seed(seed)
    kept = None if pairs is None else torch.randperm(width // 2, generator=generator)[:pairs].sort().values
    if not values:
        return AttentionPlan(width, kept)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    predictor = (draw(RANK, d_model), 1 + 0.2 * draw(RANK), 0.2 * draw(RANK), draw(width, RANK), draw(RANK))
    return AttentionPlan(width, kept, *predictor, threshold=threshold, cap=cap)


def attention_plans(folder: Path, **options: Any) -> dict[str, AttentionPlan]:
    """A plan for every attention of a tiny model, another one per layer; pairs where the family allows it."""
    anatomy = read_anatomy(Checkpoint(folder).config)
    width = head_dim(anatomy)
    if attention_support(anatomy).pairs is None:
        options = {"pairs": width // 4} | options
    return {
        attention_path(anatomy, layer): random_attention(width, anatomy.d_model, layer, **options)
        for layer in range(anatomy.num_layers)
    }


def value_mask(plan: AttentionPlan, x_D: Tensor) -> Tensor:
    """The mask [h] of one token, by the rule as it is written down."""
    e_R = plan.embedding + plan.encoder @ x_D.float()  # type: ignore[operator]
    e_R = (e_R - e_R.mean()) / torch.sqrt(e_R.var(unbiased=False) + 1e-5) * plan.norm_weight + plan.norm_bias
    v_h = plan.decoder @ (e_R * 0.5 * (1 + torch.erf(e_R / 2**0.5)))  # type: ignore[operator]
    on = [j for j in range(len(v_h)) if v_h[j] > plan.threshold]
    best_first = sorted(range(len(v_h)), key=lambda j: (-v_h[j].item(), j))
    if plan.cap is not None and len(on) > plan.cap:
        on = best_first[: plan.cap]
    mask_h = torch.zeros(len(v_h))
    mask_h[on or best_first[:1]] = 1
    return mask_h


def hook_masks(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Make a dense model compute what the plans say, with zeros in the place of what they remove."""
    for path, plan in plans.items():
        attention: Any = model.get_submodule(path)
        if plan.pairs is not None:
            keep_h = torch.zeros(plan.head_dim)
            keep_h[plan.pairs] = keep_h[plan.pairs + plan.head_dim // 2] = 1
            for linear in (attention.q_proj, attention.k_proj):
                linear.register_forward_hook(lambda _m, _i, out, keep_h=keep_h: _times(out, keep_h))
        if plan.masks_values:
            mask: dict[str, Tensor] = {}

            def predict(
                _m: Any, args: Any, kwargs: Any, plan: AttentionPlan = plan, mask: dict[str, Tensor] = mask
            ) -> None:
                x_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                rows = [value_mask(plan, x_D) for x_D in x_BTD.flatten(0, 1)]
                mask["BTh"] = torch.stack(rows).view(*x_BTD.shape[:2], -1)

            attention.register_forward_pre_hook(predict, with_kwargs=True)
            attention.v_proj.register_forward_hook(lambda _m, _i, out, mask=mask: _times(out, mask["BTh"]))
            attention.o_proj.register_forward_pre_hook(lambda _m, args, mask=mask: (_times(args[0], mask["BTh"]),))


def _times(heads: Tensor, mask: Tensor) -> Tensor:
    """[B, T, H h] times a mask [h] or [B, T, h], the same for every head."""
    mask = mask if mask.dim() == 1 else mask[:, :, None]
    return (heads.unflatten(-1, (-1, mask.shape[-1])) * mask).flatten(-2)


def dense_model(folder: Path, **options: Any) -> Any:
    """The dense model in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def anatomy_of(folder: Path) -> Anatomy:
    """Its anatomy."""
    return read_anatomy(Checkpoint(folder).config)
