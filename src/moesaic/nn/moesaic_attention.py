"""The `moesaic` architecture: pruned attention (see `modeling_moesaic.py`).

Queries and keys keep some rotary pairs, for all tokens; values and the output projection's input use some coordinates
of every head, which each token's own input decides. The KV cache holds the narrower keys.

Axes: B batch, T tokens, D model width, H heads, h head width, P kept pairs, R width of the predictor.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .moesaic_routing import KeptInFloat32


class ValueMask(KeptInFloat32):
    """Which value coordinates a token uses, decided in fp32 from the attention's input.

    v = decoder gelu(LayerNorm(embedding + encoder x)); on where v > `threshold`; of more than `cap` the largest, of
    none the largest one.
    """

    def __init__(self, spec: dict[str, Any], d_model: int) -> None:
        super().__init__()
        self.threshold, self.cap = spec["threshold"], spec["cap"] or spec["head_dim"]
        head_dim, rank = spec["head_dim"], spec["rank"]
        shapes = {"encoder": (rank, d_model), "decoder": (head_dim, rank)}
        shapes |= dict.fromkeys(("norm_weight", "norm_bias", "embedding"), (rank,))
        self.encoder: Tensor
        self.decoder: Tensor
        self.norm_weight: Tensor
        self.norm_bias: Tensor
        self.embedding: Tensor
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def scores(self, x_BTD: Tensor) -> Tensor:
        """v [B, T, h], fp32."""
        if not x_BTD.is_meta and torch.is_autocast_enabled(x_BTD.device.type):
            with torch.autocast(x_BTD.device.type, enabled=False):
                return self.scores(x_BTD)
        e_BTR = self.embedding + F.linear(x_BTD.float(), self.encoder)
        e_BTR = F.layer_norm(e_BTR, e_BTR.shape[-1:], self.norm_weight, self.norm_bias)
        return F.linear(F.gelu(e_BTR), self.decoder)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The mask [B, T, h], of 0 and 1 in the dtype of x; at least one 1, at most ``cap``."""
        sorted_BTh, order_BTh = self.scores(x_BTD).sort(dim=-1, descending=True, stable=True)
        on_BTh = sorted_BTh > self.threshold
        on_BTh[..., self.cap :] = False
        on_BTh[..., 0] = True
        return torch.zeros_like(on_BTh).scatter(-1, order_BTh, on_BTh).to(x_BTD.dtype)


class PrunedAttention(nn.Module):
    """The dense family's attention with fewer query and key coordinates and masked values.

    Takes over the projections, norms and constants of the family's own module and uses its functions for rotation and
    eager attention. The softmax scale stays the full head's. Implementations that want keys and values of one width
    (FlashAttention 2) cannot run it where pairs were removed. `output_attentions` records none of its weights, as
    transformers knows only the family's own class.

    Args:
        dense: The family's attention module; it needs q_proj, k_proj, v_proj and o_proj.
        spec: `head_dim` h, `pairs` P or None for all, `rank` R or 0 for no value mask, `threshold`, `cap`.
    """

    pairs: Tensor | None

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, dense: nn.Module, spec: dict[str, Any]) -> None:
        super().__init__()
        family: Any = dense
        self.config, self.layer_idx, self.is_causal = family.config, family.layer_idx, family.is_causal
        self.scaling, self.attention_dropout = family.scaling, family.attention_dropout
        self.num_key_value_groups = family.num_key_value_groups
        self.head_dim: int = spec["head_dim"]
        self.rotates = bool(getattr(family, "use_rope", True))
        options = {"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"}
        found = {option: getattr(family, name, None) for option, name in options.items()}
        self.options = {option: value for option, value in found.items() if value is not None}
        functions = sys.modules[type(dense).__module__]
        self.rotate, self.eager = functions.apply_rotary_pos_emb, functions.eager_attention_forward
        for name, child in dense.named_children():
            self.add_module(name, child)
        if spec["pairs"] is not None:
            self.q_proj, self.k_proj = (self._narrow(family.q_proj, spec), self._narrow(family.k_proj, spec))
        self.register_buffer("pairs", None if spec["pairs"] is None else torch.zeros(spec["pairs"], dtype=torch.long))
        self.value_mask = ValueMask(spec, family.q_proj.in_features) if spec["rank"] else None

    def _narrow(self, linear: nn.Linear, spec: dict[str, Any]) -> nn.Linear:
        width = linear.out_features // self.head_dim * 2 * spec["pairs"]
        weight = linear.weight
        return nn.Linear(
            linear.in_features, width, bias=linear.bias is not None, device=weight.device, dtype=weight.dtype
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the family's own forward takes and returns; transformers calls the cache ``cache`` since 5.24."""
        shape = hidden_states.shape[:-1]
        width = self.head_dim if self.pairs is None else 2 * len(self.pairs)
        query_BHTh = self._heads(self.q_proj(hidden_states), "q_norm", width)
        key_BHTh = self._heads(self.k_proj(hidden_states), "k_norm", width)
        value_BTHh = self.v_proj(hidden_states).view(*shape, -1, self.head_dim)
        mask_BTh = None if self.value_mask is None else self.value_mask(hidden_states)
        if mask_BTh is not None:
            value_BTHh = value_BTHh * mask_BTh[:, :, None]
        value_BHTh = value_BTHh.transpose(1, 2)
        if self.rotates and position_embeddings is not None:
            cos, sin = position_embeddings
            if self.pairs is not None:
                kept = torch.cat([self.pairs, self.pairs + self.head_dim // 2])
                cos, sin = cos.index_select(-1, kept), sin.index_select(-1, kept)
            query_BHTh, key_BHTh = self.rotate(query_BHTh, key_BHTh, cos, sin)
        kept = past_key_values if cache is None else cache
        if kept is not None:
            key_BHTh, value_BHTh = kept.update(key_BHTh, value_BHTh, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        out_BTHh, weights = attend(
            self,
            query_BHTh,
            key_BHTh,
            value_BHTh,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.options,
            **kwargs,
        )
        if mask_BTh is not None:
            out_BTHh = out_BTHh.reshape(*shape, -1, self.head_dim) * mask_BTh[:, :, None]
        return self.o_proj(out_BTHh.reshape(*shape, -1).contiguous()), weights

    def _heads(self, projected: Tensor, norm_name: str, width: int) -> Tensor:
        """[B, T, H * width] -> [B, H, T, width], normed over each head or over all, as the family does."""
        norm: Any = self._modules.get(norm_name)
        heads_BTHh = projected.view(*projected.shape[:-1], -1, width)
        if norm is None:
            return heads_BTHh.transpose(1, 2)
        if norm.weight.numel() == width:
            return norm(heads_BTHh).transpose(1, 2)
        return norm(projected).view(heads_BTHh.shape).transpose(1, 2)


def swap_attention(model: nn.Module, sites: Mapping[str, dict[str, Any]]) -> None:
    """Put a :class:`PrunedAttention` in the place of every site (module path -> spec) of a dense model."""
    for path, spec in sites.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, PrunedAttention(model.get_submodule(path), spec))
