"""What turns expert embeddings into mask logits, one head per sub-module, and what routes tokens.

Source: ToMoE (arXiv 2501.15316), appendix with the module table: Router, Proj_MLP^D, Proj_MHA^E, Proj_MHA^D.
All in float32, whatever the base model runs in.

Axes: T tokens, D model width, F neurons, N experts, R embedding width, H dims of an attention head, P rotary pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """D(e) = W GELU(LN(e)): an embedding [..., R] to logits [..., outputs]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, outputs, bias=False)

    def forward(self, embedding: Tensor) -> Tensor:
        """Logits."""
        return self.projection(F.gelu(self.norm(embedding)))


class FFNHead(nn.Module):
    """Masks and router of one FFN.

    Args:
        d_model, d_ff, experts, width: D, F, N, R.
        offset: Whether a logit of its own per expert and neuron is added to the decoded one [OURS]; starts at zero.
    """

    def __init__(self, d_model: int, d_ff: int, experts: int, width: int, offset: bool) -> None:
        super().__init__()
        self.decoder = Decoder(width, d_ff)
        self.router = nn.Linear(d_model, experts, bias=False)
        self.offset_NF = nn.Parameter(torch.zeros(experts, d_ff)) if offset else None
        self.d_ff = d_ff
        self.random = False
        """Whether the offset alone is the logits."""

    def logits(self, embedding_NR: Tensor) -> Tensor:
        """Mask logits [N, F]."""
        if self.random and self.offset_NF is not None:
            return self.offset_NF
        logits_NF = self.decoder(embedding_NR)
        return logits_NF if self.offset_NF is None else logits_NF + self.offset_NF


class AttentionHead(nn.Module):
    """Masks of one attention block, shared by all its heads: H value dims per token, P rotary pairs for all tokens.

    Args:
        d_model, width: D, R.
        values: H, or 0 when V and O are left alone.
        pairs: P, or 0 when Q and K are left alone.
        dynamic_pairs: Whether the pairs depend on the token too (a study: it saves no cache and is not exported).
    """

    def __init__(self, d_model: int, width: int, values: int, pairs: int, dynamic_pairs: bool = False) -> None:
        super().__init__()
        self.values, self.pairs = values, pairs
        self.decoder = Decoder(width, values + pairs)
        self.encoder = nn.Linear(d_model, width, bias=False) if values or dynamic_pairs else None

    def value_logits(self, embedding_NR: Tensor, x_TD: Tensor) -> Tensor:
        """Logits of the value dims, [..., H]: D(mean embedding + W_E x), the first H rows."""
        return self._dynamic(embedding_NR, x_TD, slice(0, self.values))

    def dynamic_pair_logits(self, embedding_NR: Tensor, x_TD: Tensor) -> Tensor:
        """Token-dependent logits of the pairs, [..., P] [OURS]."""
        return self._dynamic(embedding_NR, x_TD, slice(self.values, None))

    def pair_logits(self, embedding_NR: Tensor) -> Tensor:
        """Logits of the pairs, [P]: D(mean embedding), the last P rows."""
        hidden_R = F.gelu(self.decoder.norm(embedding_NR.mean(0)))
        return self.decoder.projection.weight[self.values :] @ hidden_R

    @torch.no_grad()
    def make_constant(self, logits: Tensor) -> None:
        """Make every logit what is given, whatever the token and the embedding: [H + P]."""
        if self.encoder is not None:
            self.encoder.weight.zero_()
        self.decoder.norm.weight.zero_()
        self.decoder.norm.bias.fill_(1.0)
        hidden = F.gelu(self.decoder.norm.bias)
        self.decoder.projection.weight.copy_(logits[:, None] / hidden.sum() * torch.ones_like(hidden))

    def _dynamic(self, embedding_NR: Tensor, x_TD: Tensor, rows: slice) -> Tensor:
        assert self.encoder is not None
        hidden_TR = F.gelu(self.decoder.norm(embedding_NR.mean(0) + self.encoder(x_TD)))
        return F.linear(hidden_TR, self.decoder.projection.weight[rows])
