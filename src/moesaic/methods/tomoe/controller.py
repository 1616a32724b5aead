"""All that ToMoE trains: the hypernetwork and one head per FFN and attention block.

Axes: L masked layers, D model width, F neurons, N experts, R embedding width, H dims of an attention head, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.methods.tomoe.attention import AttentionSite
from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.heads import AttentionHead, FFNHead
from moesaic.methods.tomoe.hypernetwork import Hypernetwork
from moesaic.methods.tomoe.samplers import MEDIAN

_FAR = 6.0  # a logit so far from the median is hardly ever flipped by the noise


@dataclass(frozen=True)
class Decoded:
    """One evaluation of the hypernetwork.

    Attributes:
        embeddings: E, [2 L, N, R]: attention and FFN of each layer in turn.
        neurons: Mask logits [N, F] per layer, without the bias b.
        pairs: Logits [P] per layer, or None where queries and keys are left alone or depend on the token.
    """

    embeddings: Tensor
    neurons: list[Tensor]
    pairs: list[Tensor | None]


class Controller(nn.Module):
    """Hypernetwork, FFN heads and attention heads, in float32.

    Args:
        config: ToMoE's options.
        d_model: D.
        widths: F of each masked FFN.
        attention: The attention blocks beside them; empty when attention is left alone.
    """

    def __init__(self, config: Config, d_model: int, widths: Sequence[int], attention: Sequence[AttentionSite] = ()):
        super().__init__()
        self.dynamic_pairs = config.attention == "dynamic"
        self.hypernetwork = Hypernetwork(2 * len(widths), config.experts, config.embedding, config.train_noise)
        self.ffn = nn.ModuleList(
            FFNHead(d_model, width, config.experts, config.embedding, config.offset) for width in widths
        )
        self.attention = nn.ModuleList(_attention_head(config, d_model, site) for site in attention)
        if config.masks == "random":
            self._freeze_random(config)

    def _freeze_random(self, config: Config) -> None:
        """Random masks in place of the decoded ones, and nothing but the routers left to train."""
        self.requires_grad_(False)
        for head in self.ffn_heads:
            head.offset_NF = nn.Parameter(torch.randn(len(head.router.weight), head.d_ff), requires_grad=False)
            head.random = True
            head.router.requires_grad_(True)
        for head in self.attention_heads:
            logits = [_random_logits(count, config) for count in (head.values, head.pairs)]
            head.make_constant(torch.cat(logits))

    @property
    def ffn_heads(self) -> list[FFNHead]:
        """The FFN heads, typed."""
        return [head for head in self.ffn if isinstance(head, FFNHead)]

    @property
    def attention_heads(self) -> list[AttentionHead]:
        """The attention heads, typed."""
        return [head for head in self.attention if isinstance(head, AttentionHead)]

    def forward(self) -> Decoded:
        """Decode all static mask logits."""
        embeddings = self.hypernetwork()
        neurons = [head.logits(embeddings[2 * place + 1]) for place, head in enumerate(self.ffn_heads)]
        pairs: list[Tensor | None] = [None] * len(neurons)
        for place, head in enumerate(self.attention_heads):
            if head.pairs and not self.dynamic_pairs:
                pairs[place] = head.pair_logits(embeddings[2 * place])
        return Decoded(embeddings, neurons, pairs)

    def groups(self, config: Config) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser: offsets, routers and attention with their own rates, and the rest."""
        offsets = [head.offset_NF for head in self.ffn_heads if head.offset_NF is not None]
        routers = [head.router.weight for head in self.ffn_heads]
        attention = list(self.attention.parameters())
        apart = {id(parameter) for parameter in (*offsets, *routers, *attention)}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in apart]
        rate = config.train.learning_rate
        groups = [
            {"params": _trained(rest), "lr": rate},
            {"params": _trained(routers), "lr": config.router_rate or rate},
            {"params": _trained(attention), "lr": config.attention_rate or rate},
            {"params": _trained(offsets), "lr": config.offset_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _random_logits(count: int, config: Config) -> Tensor:
    """``active`` of them far above the threshold and the others far below, at random places."""
    on = torch.randperm(count) < max(1, int(config.active * count))
    return MEDIAN - config.bias + torch.where(on, _FAR, -_FAR)


def _attention_head(config: Config, d_model: int, site: AttentionSite) -> AttentionHead:
    values = site.head_dim if config.attention in ("values", "both", "dynamic") else 0
    pairs = site.pairs if config.attention != "values" else 0
    return AttentionHead(d_model, config.embedding, values, pairs, config.attention == "dynamic")
