"""The `moesaic` architecture, part 2: feed-forward networks of experts (see `modeling_moesaic.py`).

An FFN keeps its own matrices. Its neurons only stand in another order, [shared; expert 0; expert 1; ...], and a router
says which runs of rows a token uses: `gate_proj.weight` and `up_proj.weight` are [P, D], `down_proj.weight` is [D, P].

Axes: T tokens, D model width, P packed neurons, E routed experts, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .moesaic_routing import KeptInFloat32, Router

# Dispatch constants, measured with benchmarks/ffn.py on a Zen 4 CPU (MKL for fp32, oneDNN for bf16), torch 2.13.
SORT_FROM_FP32 = 5  # tokens from which giving each expert its own tokens beats masking
SORT_FROM_BF16 = 64  # the same; oneDNN repacks its right operand, so that few tokens per expert gain little
ROWS_BF16 = 16  # sorted path: rows per expert in multiples of this; oneDNN compiles (0.5 ms) for every new number
GAP_ROWS = 128  # masked path: so many unused rows between two used runs cost less than a second run
WEIGHT_FIRST_BF16 = 16  # masked path: tokens from which (W x^T)^T beats x W^T

Matmul = Callable[[Tensor, Tensor], Tensor]


class Matrices(NamedTuple):
    """An FFN's projections as one forward pass uses them: read once, however many slices it takes."""

    gate_PD: Tensor | None
    gate_bias_P: Tensor | None
    up_PD: Tensor
    up_bias_P: Tensor | None
    down_DP: Tensor


def effective_weight(linear: nn.Module) -> Tensor:
    """The matrix that a linear layer stands for, as it is sliced here and never called.

    Parametrised layers (`torch.nn.utils.parametrize`) compute it when `weight` is read. Of a layer that peft has
    wrapped with LoRA it is W + s B A of the active adapters; dropout on their input is not applied.

    Raises TypeError for wrappers whose effect on the matrix is not known.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight
    wrapped: Any = linear
    if not hasattr(wrapped, "lora_A") or not isinstance(wrapped.base_layer, nn.Linear):
        raise TypeError(f"the experts' matrices are sliced: {type(linear).__name__} in place of nn.Linear is not known")
    weight = wrapped.base_layer.weight
    if wrapped.disable_adapters or wrapped.merged:
        return weight
    for adapter in wrapped.active_adapters:
        if adapter in getattr(wrapped, "lora_variant", ()) or wrapped.lora_bias.get(adapter):
            raise TypeError("the experts' matrices are sliced: only plain LoRA without bias has a matrix of its own")
        if adapter in wrapped.lora_A:
            weight = weight + wrapped.get_delta_weight(adapter).to(weight.dtype)
    return weight


class MoEFeedForward(KeptInFloat32):
    """A feed-forward network of one shared and E routed experts, of which each token uses K.

    Args:
        spec: `neurons` P, `shared` S, `experts` E, `expert_width`, `top_k` K, `router` (static, linear, low_rank,
            gated), `router_rank`, `router_tensors`, `normalise_input`, `gate` (uniform, scaled, softmax_topk,
            sigmoid), `selection_bias`, `gated`, `gate_bias`, `up_bias`, `down_bias`.
        d_model: D.
        activation: Name as in transformers.

    `all_experts_on = True` makes every expert count once with weight 1; a partition then computes the dense network.

    No path loops over tokens. Few tokens: the rows of the experts that anybody chose are multiplied with all tokens,
    neighbours as one matrix, and what a token did not choose is zeroed before the down projection; that costs the
    active rows, at most the dense network. Many tokens: each expert gets its own. The constants say where that begins.
    """

    selection_bias: Tensor | None

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__()
        self.shared, self.experts, self.width = spec["shared"], spec["experts"], spec["expert_width"]
        self.top_k, self.gate = spec["top_k"], spec["gate"]
        self.static = spec["router"] == "static"
        self.all_experts_on = False
        self.act = ACT2FN[activation]
        neurons = spec["neurons"]
        self.gate_proj = nn.Linear(d_model, neurons, bias=spec["gate_bias"]) if spec["gated"] else None
        self.up_proj = nn.Linear(d_model, neurons, bias=spec["up_bias"])
        self.down_proj = nn.Linear(neurons, d_model, bias=spec["down_bias"])
        self.router = None if self.static else Router(spec, d_model, activation)
        bias_E = torch.zeros(self.experts, dtype=torch.float32) if spec["selection_bias"] else None
        self.register_buffer("selection_bias", bias_E)
        scale_E = torch.zeros(self.experts, dtype=torch.float32) if self.gate == "scaled" else None
        self.gate_scale = None if scale_E is None else nn.Parameter(scale_E)

    def decisive(self) -> dict[str, Tensor]:
        """See :class:`KeptInFloat32`."""
        own = {"selection_bias": self.selection_bias, "gate_scale": self.gate_scale}
        return {name: tensor for name, tensor in own.items() if tensor is not None}

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores z_TE in fp32; zeros under the static router."""
        if self.router is None:
            return x_TD.new_zeros(x_TD.shape[0], self.experts, dtype=torch.float32)
        return self.router(x_TD)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts idx_TK (best first, lower index first among equals) and their weights weight_TK, fp32."""
        idx_TK, weight_TK = self._route(x_TD)
        return idx_TK, torch.ones_like(idx_TK, dtype=torch.float32) if weight_TK is None else weight_TK

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`route` with None for weights of 1: with few tokens, every operation that is left out shows."""
        z_TE = self.scores(x_TD)
        p_TE, key_TE = self._keys(z_TE)
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

    def expert(self, e: int, x_TD: Tensor) -> Tensor:
        """Output of routed expert ``e`` alone with weight 1, without the output bias, [T, D]."""
        return self._expert(self.matrices(), e, x_TD)

    def _expert(self, matrices: Matrices, e: int, x_TD: Tensor) -> Tensor:
        start = self.shared + e * self.width
        return self._rows(matrices, x_TD, start, start + self.width)

    def matrices(self) -> Matrices:
        """The projections as they are now, adapters included."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        gate_PD, gate_bias_P = (None, None) if gate is None else (effective_weight(gate), gate.bias)
        return Matrices(gate_PD, gate_bias_P, effective_weight(up), up.bias, effective_weight(down))

    def forward(self, x: Tensor) -> Tensor:
        """y of the shape of x, [..., D]."""
        # Offloaded weights (``device_map``) come with accelerate's hooks of the layers' own forwards, not called here.
        layers: list[Any] = [layer for layer in (self.gate_proj, self.up_proj, self.down_proj) if layer is not None]
        offloaded = [layer for layer in layers if hasattr(layer, "_hf_hook")]
        for layer in offloaded:
            layer._hf_hook.pre_forward(layer)
        y = self._forward(x)
        for layer in offloaded:
            layer._hf_hook.post_forward(layer, None)
        return y

    def _forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        matrices = self.matrices()
        if self.static or self.all_experts_on:
            y_TD = self._every(matrices, x_TD)
        else:
            idx_TK, weight_TK = self._route(x_TD)
            path = self._sorted if self._prefers_sort(x_TD) else self._masked
            y_TD = path(matrices, x_TD, idx_TK, None if weight_TK is None else weight_TK.to(x_TD.dtype))
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        return y_TD.reshape(x.shape).contiguous()

    def _every(self, matrices: Matrices, x_TD: Tensor) -> Tensor:
        """Sum of the shared expert and all others, each with weight 1."""
        return self._rows(matrices, x_TD, 0, matrices.up_PD.shape[0])

    def _prefers_sort(self, x_TD: Tensor) -> bool:
        """Whether to gather each expert's tokens. Not while compiling: the masked path is one graph of fixed shapes."""
        if x_TD.is_meta or torch.compiler.is_compiling():
            return False
        return x_TD.shape[0] >= (SORT_FROM_FP32 if x_TD.dtype == torch.float32 else SORT_FROM_BF16)

    def _masked(self, matrices: Matrices, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """All tokens through all rows that some token uses; what a token did not choose is zeroed before going down."""
        tokens, runs = x_TD.shape[0], self._runs(idx_TK)
        weight_TE = None
        if tokens > 1 or weight_TK is not None or sum(last - max(first, 0) for first, last in runs) > self.top_k:
            weight_TE = x_TD.new_zeros(tokens, self.experts).scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
        up_matmul, down_matmul = matmuls(x_TD)
        y_TD = None
        for first, last in runs:  # expert -1 stands for the shared one
            start = self.shared + first * self.width if first >= 0 else 0
            stop = self.shared + last * self.width
            h_TM = hidden(matrices, self.act, x_TD, start, stop, up_matmul)
            if weight_TE is not None and last > 0:
                h_TM = self._weigh(h_TM, weight_TE[:, max(first, 0) : last])
            part_TD = down(matrices, h_TM, start, stop, down_matmul)
            y_TD = part_TD if y_TD is None else y_TD + part_TD
        return torch.zeros_like(x_TD) if y_TD is None else y_TD

    def _weigh(self, h_TM: Tensor, weight_TE: Tensor) -> Tensor:
        """The last columns of h_TM, those of the routed experts, times each expert's weight."""
        routed = weight_TE.shape[1] * self.width
        shared_TM, routed_TM = h_TM[:, :-routed], h_TM[:, -routed:]
        own_TEM = routed_TM.unflatten(1, (-1, self.width))
        if not torch.is_grad_enabled():
            own_TEM *= weight_TE[:, :, None]
            return h_TM
        weighted_TM = (own_TEM * weight_TE[:, :, None]).flatten(1)
        return torch.cat([shared_TM, weighted_TM], dim=1)

    def _runs(self, idx_TK: Tensor) -> list[tuple[int, int]]:
        """Chosen experts as half-open ranges of neighbours and near neighbours; the shared expert is -1, next to 0."""
        if idx_TK.is_meta or torch.compiler.is_compiling() or idx_TK.numel() >= 4 * self.experts:
            active = range(self.experts)
        else:
            active = sorted(set(idx_TK.flatten().tolist()))
        runs: list[tuple[int, int]] = [(-1, 0)] if self.shared else []
        gap = GAP_ROWS // max(self.width, 1)
        for e in active:
            if runs and e - runs[-1][1] <= gap:
                runs[-1] = (runs[-1][0], e + 1)
            else:
                runs.append((e, e + 1))
        return runs

    def _sorted(self, matrices: Matrices, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """Each expert multiplies the tokens that chose it; idle experts cost nothing."""
        order = idx_TK.flatten().argsort(stable=True)
        counts = torch.bincount(idx_TK.flatten(), minlength=self.experts).tolist()
        tokens = order // idx_TK.shape[1]
        weights = None if weight_TK is None else weight_TK.flatten()[order]
        multiple = ROWS_BF16 if x_TD.device.type == "cpu" and x_TD.dtype != torch.float32 else 1
        y_TD = self._rows(matrices, x_TD, 0, self.shared) if self.shared else torch.zeros_like(x_TD)
        begin = 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            # Rounding up takes in rows of a neighbouring expert; they are computed and dropped.
            rows = -(-count // multiple) * multiple
            first = max(0, min(begin, len(tokens) - rows))
            own = slice(begin - first, begin - first + count)
            part_ND = self._expert(matrices, e, x_TD[tokens[first : first + rows]])[own]
            if weights is not None:
                part_ND = part_ND * weights[begin : begin + count, None]
            y_TD.index_add_(0, tokens[begin : begin + count], part_ND.to(y_TD.dtype))
            begin += count
        return y_TD

    def _rows(self, matrices: Matrices, x_TD: Tensor, start: int, stop: int) -> Tensor:
        """Output of the packed neurons [start, stop)."""
        return down(matrices, hidden(matrices, self.act, x_TD, start, stop), start, stop)


def hidden(
    matrices: Matrices, act: nn.Module, x_TD: Tensor, start: int, stop: int, matmul: Matmul = F.linear
) -> Tensor:
    """Activations h_TM of the packed neurons [start, stop)."""
    rows = slice(start, stop)
    up_TM = _project(x_TD, matrices.up_PD, matrices.up_bias_P, rows, matmul)
    if matrices.gate_PD is None:
        return act(up_TM)
    gate_TM = act(_project(x_TD, matrices.gate_PD, matrices.gate_bias_P, rows, matmul))
    return gate_TM * up_TM if torch.is_grad_enabled() else gate_TM.mul_(up_TM)


def down(matrices: Matrices, h_TM: Tensor, start: int, stop: int, matmul: Matmul = F.linear) -> Tensor:
    """What the packed neurons [start, stop) with activations h_TM add to the output, [T, D]."""
    return matmul(h_TM, matrices.down_DP[:, start:stop])


def _project(x_TD: Tensor, weight_PD: Tensor, bias_P: Tensor | None, rows: slice, matmul: Matmul) -> Tensor:
    y_TM = matmul(x_TD, weight_PD[rows])
    return y_TM if bias_P is None else y_TM + bias_P[rows]


def _weight_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    """x W^T as (W x^T)^T: the library then packs the few tokens and not the weights."""
    return (w_MD @ x_TD.t()).t()


def _tokens_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    return F.linear(x_TD.contiguous(), w_MD)


def matmuls(x_TD: Tensor) -> tuple[Matmul, Matmul]:
    """The masked path's products up and down, each in the operand order that is faster for so many tokens."""
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear, F.linear
    if x_TD.dtype == torch.float32:
        return (_weight_first, _tokens_first) if x_TD.shape[0] < SORT_FROM_FP32 else (F.linear, F.linear)
    return (_weight_first, _weight_first) if x_TD.shape[0] >= WEIGHT_FIRST_BF16 else (F.linear, F.linear)


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
