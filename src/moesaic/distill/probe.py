"""How sparse the FFN's inputs are in a learned dictionary: a top-k autoencoder, as sparse autoencoders are.

x is approximated by b + sum over the k largest of relu(<e_i, x - b> + a_i) d_i. Where k atoms explain much more of real
inputs than k principal directions do, and not of their Gaussian twin, the inputs are a union of low-dimensional
subspaces: what an efficient mixture of experts needs (T2 of docs/methods/secret_moe.md).

Axes: T tokens, D model width, M atoms, K active atoms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.distill.gathered import combine, dots
from moesaic.distill.student import search


class TopKAutoencoder(nn.Module):
    """A dictionary whose atoms start as random unit vectors, encoder and decoder equal.

    Args:
        x_TD: Inputs to start from: their mean is the first offset, their spread the unit.
        atoms: M.
        top_k: K.
        seed: Of the first atoms, which are random directions.
    """

    scale: Tensor

    def __init__(self, x_TD: Tensor, atoms: int, top_k: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        atoms_MD = F.normalize(torch.randn(atoms, x_TD.shape[1], generator=generator), dim=1)
        self.top_k = top_k
        self.decode_MD = nn.Parameter(atoms_MD)
        self.encode_MD = nn.Parameter(atoms_MD.clone())
        self.bias_M = nn.Parameter(torch.zeros(atoms))
        self.offset_D = nn.Parameter(x_TD.mean(0))
        self.register_buffer("scale", x_TD.var(0).mean().sqrt())

    def forward(self, x_TD: Tensor) -> Tensor:
        """The approximation, over the inputs' spread, so that training sees unit variance."""
        offset_D = self.offset_D / self.scale
        seen_TD = x_TD / self.scale - offset_D
        chosen = search(lambda x_BD: F.linear(x_BD, self.encode_MD, self.bias_M), seen_TD, self.top_k, len(self.bias_M))
        h_TK = F.relu(dots(chosen, self.encode_MD, seen_TD) + self.bias_M[chosen.index_TK])
        return combine(chosen, h_TK, self.decode_MD) + offset_D
