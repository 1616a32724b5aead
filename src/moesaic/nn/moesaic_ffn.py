"""The `moesaic` architecture: feed-forward networks of experts (see `modeling_moesaic.py`).

An FFN keeps its own matrices. Its neurons only stand in another order, [shared; expert 0; expert 1; ...], and a router
says which runs of rows a token uses: `gate_proj.weight` and `up_proj.weight` are [P, D], `down_proj.weight` is [D, P].

Axes: T tokens, D model width, P packed neurons, E routed experts, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .moesaic_activation import build_activation
from .moesaic_paths import PATHS, Row, choose
from .moesaic_routing import KeptInFloat32, Router
from .moesaic_side_by_side import ready_to_train, take_apart
from .moesaic_slices import Matrices, down, effective_weight, hidden


class MoEFeedForward(KeptInFloat32):
    """A feed-forward network of one shared and E routed experts, of which each token uses K.

    Args:
        spec: `neurons` P, `shared` S, `experts` E, `expert_width`, `top_k` K, `router` (static, linear, low_rank,
            gated), `router_rank`, `router_tensors`, `normalise_input`, `gate` (uniform, scaled, softmax_topk,
            sigmoid), `selection_bias`, `gated`, `gate_bias`, `up_bias`, `down_bias`.
        d_model: D.
        activation: Name as in transformers, or with constants: see `moesaic_activation.py`.

    `all_experts_on = True` makes every expert count once with weight 1; a partition then computes the dense network.

    How it is computed is a path's matter: see `moesaic_paths.py`. No path loops over tokens.

    Attributes:
        layout: How the experts are stored.
        table: The paths that know such an FFN.
        linear: Makes a projection of two widths, with a bias or without.
        asked: Names of paths that are to be taken, the first that supports an input; see :func:`use_path`.
    """

    layout: ClassVar[str] = "packed"
    table: tuple[Row, ...] = PATHS
    linear: ClassVar[Any] = nn.Linear
    asked: tuple[str, ...] = ()
    selection_bias: Tensor | None

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__()
        self.shared, self.experts, self.width = spec["shared"], spec["experts"], spec["expert_width"]
        self.neurons, self.top_k, self.gate = spec["neurons"], spec["top_k"], spec["gate"]
        self.static = spec["router"] == "static"
        self.all_experts_on = False
        self.activation, self.act_fn = activation, build_activation(activation)
        linear = self.linear
        self.gate_proj = linear(d_model, self.neurons, bias=spec["gate_bias"]) if spec["gated"] else None
        self.up_proj = linear(d_model, self.neurons, bias=spec["up_bias"])
        self.down_proj = linear(self.neurons, d_model, bias=spec["down_bias"])
        self.router: Any = None if self.static else self._make_router(spec, d_model)
        bias_E = torch.zeros(self.experts, dtype=torch.float32) if spec["selection_bias"] else None
        self.register_buffer("selection_bias", bias_E)
        scale_E = torch.zeros(self.experts, dtype=torch.float32) if self.gate == "scaled" else None
        self.gate_scale = None if scale_E is None else nn.Parameter(scale_E)

    def _make_router(self, spec: dict[str, Any], d_model: int) -> nn.Module:
        return Router(spec, d_model)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        take_apart(self)  # its layers are saved after it
        super()._save_to_state_dict(*args, **kwargs)

    @property
    def routed(self) -> bool:
        """Whether a router decides what counts; else all experts do, with weight 1."""
        return not (self.static or self.all_experts_on or self._takes_all())

    def _takes_all(self) -> bool:
        """Whether a token always chooses all experts with weight 1. A method: `torch.compile` of torch 2.13 takes a
        property of a property's `super()` to be true."""
        return False

    def decisive(self) -> dict[str, Tensor]:
        """See :class:`KeptInFloat32`."""
        own = {"selection_bias": self.selection_bias, "gate_scale": self.gate_scale}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores z_TE in fp32; zeros under the static router."""
        if self.router is None:
            return x_TD.new_zeros(x_TD.shape[0], self.experts, dtype=torch.float32)
        return self.router(x_TD, self.act_fn)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts idx_TK (best first, lower index first among equals) and their weights weight_TK, fp32."""
        idx_TK, weight_TK = self._route(x_TD)
        return idx_TK, torch.ones_like(idx_TK, dtype=torch.float32) if weight_TK is None else weight_TK

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`route` with None for weights of 1: with few tokens, every operation that is left out shows."""
        z_TE = self.scores(x_TD)
        p_TE, key_TE = self._keys(z_TE)
        if self.top_k == 1:  # the first of the largest; sorting would take longer than a product
            idx_TK = key_TE.argmax(dim=-1, keepdim=True)
        else:
            idx_TK = key_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        if self.gate_scale is not None:
            return idx_TK, 1 + p_TE.gather(1, idx_TK) * self.gate_scale[idx_TK]
        if self.gate == "sigmoid":
            return idx_TK, 2 * p_TE.gather(1, idx_TK)
        if self.gate == "softmax_topk":
            return idx_TK, self.top_k * torch.softmax(z_TE.gather(1, idx_TK), dim=-1)
        return idx_TK, None

    def keys(self, x_TD: Tensor) -> Tensor:
        """What experts are ranked by, key_TE in fp32: the scores, or with a selection bias their function plus it."""
        return self._keys(self.scores(x_TD))[1]

    def _keys(self, z_TE: Tensor) -> tuple[Tensor, Tensor]:
        p_TE = z_TE  # neither function changes the order: they are needed only for a bias or a weight
        if self.gate == "sigmoid":
            p_TE = torch.sigmoid(z_TE)
        elif self.selection_bias is not None or self.gate_scale is not None:
            p_TE = torch.softmax(z_TE, dim=-1)
        return p_TE, z_TE if self.selection_bias is None else p_TE + self.selection_bias

    def choice(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What paths need of :meth:`route`: weights in the dtype of ``x_TD``, or None where all are 1."""
        idx_TK, weight_TK = self._route(x_TD)
        return idx_TK, None if weight_TK is None else weight_TK.to(x_TD.dtype)

    def expert(self, e: int, x_TD: Tensor) -> Tensor:
        """Output of routed expert ``e`` alone with weight 1, without the output bias, [T, D]."""
        return self.expert_rows(self.matrices(), e, x_TD)

    def expert_rows(self, matrices: Matrices, e: int, x_TD: Tensor) -> Tensor:
        """:meth:`expert`, of matrices that were read before."""
        start = self.shared + e * self.width
        return self.rows(matrices, x_TD, start, start + self.width)

    def rows(self, matrices: Matrices, x_TD: Tensor, start: int, stop: int) -> Tensor:
        """Output of the packed neurons [start, stop), [T, D]."""
        return down(matrices, hidden(matrices, self.act_fn, x_TD, start, stop), start, stop)

    def matrices(self) -> Matrices:
        """The projections as they are now, adapters included."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        gate_PD, gate_bias_P = (None, None) if gate is None else (effective_weight(gate), gate.bias)
        return Matrices(gate_PD, gate_bias_P, effective_weight(up), up.bias, effective_weight(down))

    def train(self, mode: bool = True) -> Self:
        """See torch. Weights that lie side by side do so no longer."""
        if mode:
            take_apart(self)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """y of the shape of x, [..., D]."""
        # Offloaded weights (``device_map``) come with accelerate's hooks of the layers' own forwards, not called here.
        layers: list[Any] = [layer for layer in (self.gate_proj, self.up_proj, self.down_proj) if layer is not None]
        offloaded = [layer for layer in layers if hasattr(layer, "_hf_hook")]
        for layer in offloaded:
            layer._hf_hook.pre_forward(layer)
        ready_to_train(self)
        y = self._forward(x)
        for layer in offloaded:
            layer._hf_hook.post_forward(layer, None)
        return y

    def _forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TD = choose(x_TD, self).run(self, x_TD)
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        return y_TD.reshape(x.shape).contiguous()


@contextmanager
def use_path(model: nn.Module, *names: str) -> Iterator[None]:
    """Within the block, all FFNs of experts in ``model`` compute by the first of these paths that supports the input.

    Where none does, the forward pass raises ValueError and names those that do.

    Raises:
        ValueError: the model holds no such FFN, or no path has such a name.
    """
    ffns = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    known = sorted({row.path.name for ffn in ffns for row in ffn.table})
    if not ffns:
        raise ValueError(f"{type(model).__name__} holds no FFN of experts")
    if strangers := [name for name in names if name not in known]:
        raise ValueError(f"there is no path {strangers[0]!r}; there are {', '.join(known)}")
    before = [ffn.asked for ffn in ffns]
    for ffn in ffns:
        ffn.asked = names
    try:
        yield
    finally:
        for ffn, asked in zip(ffns, before, strict=True):
            ffn.asked = asked


class MoesaicExperts(nn.ModuleList):
    """The experts of an existing MoE block, each split again, in place of transformers' fused experts module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y_TD from hidden_states [T, D] and the block's own routing [T, k]."""
        order = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=len(self)).tolist()
        weights = top_k_weights.flatten()[order].split(counts)
        y_TD = torch.zeros_like(hidden_states)
        for expert, token, weight in zip(self, (order // top_k_index.shape[1]).split(counts), weights, strict=True):
            if len(token):
                y_TD = y_TD.index_add(0, token, (expert(hidden_states[token]) * weight[:, None]).to(y_TD.dtype))
        return y_TD
