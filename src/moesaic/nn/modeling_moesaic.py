"""The `moesaic` architecture for transformers: a dense language model whose FFNs are split into experts.

One self-contained file (torch and transformers only): it lies in every converted folder, so that
`trust_remote_code=True` works where moesaic is not installed.

An FFN keeps its own matrices. Its neurons only stand in another order, [shared; expert 0; expert 1; ...], and a router
says which runs of rows a token uses: `gate_proj.weight` and `up_proj.weight` are [P, D], `down_proj.weight` is [D, P].

Axes: T tokens, D model width, P packed neurons, E routed experts, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

# Dispatch constants, measured with benchmarks/ffn.py on a Zen 4 CPU (MKL for fp32, oneDNN for bf16), torch 2.13.
SORT_FROM_FP32 = 5  # tokens from which giving each expert its own tokens beats masking
SORT_FROM_BF16 = 64  # the same; oneDNN repacks its right operand, so that few tokens per expert gain little
ROWS_BF16 = 16  # sorted path: rows per expert in multiples of this; oneDNN compiles (0.5 ms) for every new number
GAP_ROWS = 128  # masked path: so many unused rows between two used runs cost less than a second run
WEIGHT_FIRST_BF16 = 16  # masked path: tokens from which (W x^T)^T beats x W^T

Matmul = Callable[[Tensor, Tensor], Tensor]


class MoesaicConfig(PreTrainedConfig):
    """Config of a converted model.

    Args:
        text_config: Config of the dense model, as a dict with its `model_type` or as a config object.
        ffn_sites: Module path of each converted FFN -> its spec (shapes and switches, see :class:`MoEFeedForward`).
        ffn_bypass: Siblings of a converted FFN that become the identity, as it does their work (OPT's `fc2`).
    """

    model_type = "moesaic"
    sub_configs = {"text_config": PreTrainedConfig}  # type: ignore[assignment]  # noqa: RUF012
    # Read through to the dense model's config, because tools look for them on the outer one.
    _dense_attributes = frozenset(
        {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
        | {"max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    )

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        ffn_sites: dict[str, dict[str, Any]] | None = None,
        ffn_bypass: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config: PreTrainedConfig = text_config
        self.ffn_sites = dict(ffn_sites or {})
        self.ffn_bypass = list(ffn_bypass)
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._dense_attributes and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class Router(nn.Module):
    """Scores experts in fp32.

    `linear`: W x + b. `gated`: |(W_u x + b_u) act(W_g x + b_g)|, or |act(W_u x + b_u)| where there is no W_g.
    """

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__()
        self.kind = spec["router"]
        self.normalise_input = spec["normalise_input"]
        self.act = ACT2FN[activation]
        self.weight: Tensor
        self.bias: Tensor | None
        self.up: Tensor
        self.gate: Tensor | None
        self.up_bias: Tensor | None
        self.gate_bias: Tensor | None
        for name in ("weight", "bias", "up", "gate", "up_bias", "gate_bias"):
            shape = (spec["experts"],) if name.endswith("bias") else (spec["experts"], d_model)
            present = name in spec["router_tensors"]
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)) if present else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores z_TE, fp32."""
        if not x_TD.is_meta and torch.is_autocast_enabled(x_TD.device.type):
            with torch.autocast(x_TD.device.type, enabled=False):
                return self(x_TD)
        x_TD = x_TD.float()
        if self.normalise_input:
            x_TD = F.normalize(x_TD, dim=-1)
        if self.kind == "linear":
            return F.linear(x_TD, self.weight, self.bias)
        up_TE = F.linear(x_TD, self.up, self.up_bias)
        if self.gate is None:
            return self.act(up_TE).abs()
        return (up_TE * self.act(F.linear(x_TD, self.gate, self.gate_bias))).abs()


class MoEFeedForward(nn.Module):
    """A feed-forward network of one shared and E routed experts, of which each token uses K.

    Args:
        spec: `neurons` P, `shared` S, `experts` E, `expert_width`, `top_k` K, `router` (static, linear, gated),
            `router_tensors`, `normalise_input`, `gate` (uniform, scaled, softmax_topk), `selection_bias`, `gated`,
            `gate_bias`, `up_bias`, `down_bias`.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEFeedForward:
        # Routing stays in fp32 under .to(bfloat16), .half(), .double(): a rounded router would choose other experts.
        before = {name: tensor.data for name, tensor in self._routing_tensors().items()}
        super()._apply(fn, recurse)
        for name, tensor in self._routing_tensors().items():
            if tensor.dtype != torch.float32:
                tensor.data = before[name].to(tensor.device)
        return self

    def _routing_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {} if self.router is None else dict(self.router.named_parameters())
        own = {"selection_bias": self.selection_bias, "gate_scale": self.gate_scale}
        return tensors | {name: tensor for name, tensor in own.items() if tensor is not None}

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
        # The softmax keeps the order of the scores, so it is needed only where a bias is added to it.
        p_TE = torch.softmax(z_TE, dim=-1) if self.selection_bias is not None or self.gate_scale is not None else z_TE
        key_TE = z_TE if self.selection_bias is None else p_TE + self.selection_bias
        idx_TK = key_TE.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        if self.gate_scale is not None:
            return idx_TK, 1 + p_TE.gather(1, idx_TK) * self.gate_scale[idx_TK]
        if self.gate == "softmax_topk":
            return idx_TK, self.top_k * torch.softmax(z_TE.gather(1, idx_TK), dim=-1)
        return idx_TK, None

    def expert(self, e: int, x_TD: Tensor) -> Tensor:
        """Output of routed expert ``e`` alone with weight 1, without the output bias, [T, D]."""
        start = self.shared + e * self.width
        return self._down(self._hidden(x_TD, start, start + self.width), start, start + self.width)

    def forward(self, x: Tensor) -> Tensor:
        """y of the shape of x, [..., D]."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.static or self.all_experts_on:
            y_TD = self._down(self._hidden(x_TD, 0, self.up_proj.out_features), 0, self.up_proj.out_features)
        else:
            idx_TK, weight_TK = self._route(x_TD)
            path = self._sorted if self._prefers_sort(x_TD) else self._masked
            y_TD = path(x_TD, idx_TK, None if weight_TK is None else weight_TK.to(x_TD.dtype))
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        return y_TD.reshape(x.shape).contiguous()

    def _prefers_sort(self, x_TD: Tensor) -> bool:
        """Whether to gather each expert's tokens. Not while compiling: the masked path is one graph of fixed shapes."""
        if x_TD.is_meta or torch.compiler.is_compiling():
            return False
        return x_TD.shape[0] >= (SORT_FROM_FP32 if x_TD.dtype == torch.float32 else SORT_FROM_BF16)

    def _masked(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """All tokens through all rows that some token uses; what a token did not choose is zeroed before going down."""
        tokens, runs = x_TD.shape[0], self._runs(idx_TK)
        weight_TE = None
        if tokens > 1 or weight_TK is not None or sum(last - max(first, 0) for first, last in runs) > self.top_k:
            weight_TE = x_TD.new_zeros(tokens, self.experts).scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
        up_matmul, down_matmul = _matmuls(x_TD)
        y_TD = None
        for first, last in runs:  # expert -1 stands for the shared one
            start = self.shared + first * self.width if first >= 0 else 0
            stop = self.shared + last * self.width
            h_TM = self._hidden(x_TD, start, stop, up_matmul)
            if weight_TE is not None and last > 0:
                h_TM = self._weigh(h_TM, weight_TE[:, max(first, 0) : last])
            part_TD = self._down(h_TM, start, stop, down_matmul)
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

    def _sorted(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        """Each expert multiplies the tokens that chose it; idle experts cost nothing."""
        order = idx_TK.flatten().argsort(stable=True)
        counts = torch.bincount(idx_TK.flatten(), minlength=self.experts).tolist()
        tokens = order // idx_TK.shape[1]
        weights = None if weight_TK is None else weight_TK.flatten()[order]
        multiple = ROWS_BF16 if x_TD.device.type == "cpu" and x_TD.dtype != torch.float32 else 1
        y_TD = self._down(self._hidden(x_TD, 0, self.shared), 0, self.shared) if self.shared else torch.zeros_like(x_TD)
        begin = 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            # Rounding up takes in rows of a neighbouring expert; they are computed and dropped.
            rows = -(-count // multiple) * multiple
            first = max(0, min(begin, len(tokens) - rows))
            own = slice(begin - first, begin - first + count)
            part_ND = self.expert(e, x_TD[tokens[first : first + rows]])[own]
            if weights is not None:
                part_ND = part_ND * weights[begin : begin + count, None]
            y_TD.index_add_(0, tokens[begin : begin + count], part_ND.to(y_TD.dtype))
            begin += count
        return y_TD

    def _hidden(self, x_TD: Tensor, start: int, stop: int, matmul: Matmul = F.linear) -> Tensor:
        """Activations of the packed neurons [start, stop)."""
        up_TM = _project(x_TD, self.up_proj, slice(start, stop), matmul)
        if self.gate_proj is None:
            return self.act(up_TM)
        gate_TM = self.act(_project(x_TD, self.gate_proj, slice(start, stop), matmul))
        return gate_TM * up_TM if torch.is_grad_enabled() else gate_TM.mul_(up_TM)

    def _down(self, h_TM: Tensor, start: int, stop: int, matmul: Matmul = F.linear) -> Tensor:
        return matmul(h_TM, self.down_proj.weight[:, start:stop])


def _project(x_TD: Tensor, linear: nn.Linear, rows: slice, matmul: Matmul) -> Tensor:
    y_TM = matmul(x_TD, linear.weight[rows])
    return y_TM if linear.bias is None else y_TM + linear.bias[rows]


def _weight_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    """x W^T as (W x^T)^T: the library then packs the few tokens and not the weights."""
    return (w_MD @ x_TD.t()).t()


def _tokens_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    return F.linear(x_TD.contiguous(), w_MD)


def _matmuls(x_TD: Tensor) -> tuple[Matmul, Matmul]:
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


def swap_ffns(
    model: nn.Module, sites: dict[str, dict[str, Any]], bypass: Sequence[str], d_model: int, activation: str
) -> None:
    """Put a fresh :class:`MoEFeedForward` at every site (module path -> spec) of a dense model, and bypass siblings."""
    for path, spec in sites.items():
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if name.isdigit() and not isinstance(parent, MoesaicExperts):
            block_path, _, experts_name = parent_path.rpartition(".")
            count = sum(other.rpartition(".")[0] == parent_path for other in sites)
            parent = MoesaicExperts(nn.Identity() for _ in range(count))
            setattr(model.get_submodule(block_path), experts_name, parent)
        setattr(parent, name, MoEFeedForward(spec, d_model, activation))
        for sibling in bypass:
            setattr(parent, sibling, nn.Identity())


def activation_name(config: PreTrainedConfig) -> str:
    """Name of the FFN's activation in a dense model's config."""
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if (name := getattr(config, key, None)) is not None:
            return name
    raise ValueError(f"no activation in the config of {config.model_type}")


class MoesaicForCausalLM(PreTrainedModel, GenerationMixin):
    """The dense family's own model with other FFNs.

    The dense `...ForCausalLM` is built and its children become this module's, so that every tensor keeps its name.
    `_dense` is that object: no child of this module, but sharing its table of children, so that what replaces a child
    here (a resized head, a wrapped layer) is what it computes with. Forward and the preparation of inputs are its own.
    """

    _dense: Any
    config_class = MoesaicConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = [r"\.router\.", r"\.selection_bias$", r"\.gate_scale$"]  # noqa: RUF012

    def __init__(self, config: MoesaicConfig) -> None:
        super().__init__(config)
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        text_config = config.get_text_config()
        dense: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
        dense = dense(text_config)
        swap_ffns(dense, config.ffn_sites, config.ffn_bypass, config.hidden_size, activation_name(text_config))
        self.__dict__["_dense"] = dense
        self.__dict__["_modules"] = dense._modules
        self.base_model_prefix = dense.base_model_prefix
        self._tied_weights_keys = dense._tied_weights_keys
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any
    ) -> MoesaicForCausalLM:
        """See transformers, which renames GPT-NeoX's head between disk and model only for its own class."""
        key_mapping = {r"^embed_out\.": "lm_head."} | (key_mapping or {})
        return super().from_pretrained(*args, key_mapping=key_mapping, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """What the dense family's forward takes and returns."""
        return self._dense(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._dense.prepare_inputs_for_generation(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self._dense.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self._dense.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._dense.set_output_embeddings(new_embeddings)

    def all_experts_on(self, on: bool = True) -> None:
        """Switch routing off in every converted FFN (all experts, unit weights), or on again. For parity checks."""
        for module in self.modules():
            if isinstance(module, MoEFeedForward):
                module.all_experts_on = on
