"""What a model is made of, as data: where each FFN sits, what its tensors are called, how wide it is.

A :class:`Family` is one small table (see ``families/llama.py``); an :class:`Anatomy` is that table applied to a
config.json. No torch here: ``moesaic plan`` reads only this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.errors import UnsupportedModelError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class FFNNames:
    """Names of an FFN's projections, relative to its module. ``{name}.weight`` and, where present, ``{name}.bias``.

    Attributes:
        fused: ``up`` holds gate and up as one matrix [2F, D], gate first (Phi-3).
        interleaved: In that matrix their rows take turns (gpt-oss).
        transposed: Matrices are stored [in, out] (GPT-2's Conv1D).
        learned: Tensors of an activation that is learned (Apertus).
        stacked: Each tensor holds all experts of a block, [E, ...]; names are relative to that block (Granite).
        suffixes: What follows a name where it is not ``.weight`` and ``.bias``.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    transposed: bool = False
    learned: tuple[str, ...] = ()
    stacked: bool = False
    interleaved: bool = False
    suffixes: tuple[str, str] = (".weight", ".bias")

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate path."""
        return self.gate is not None or self.fused


# gate_proj, up_proj, down_proj: what most gated families call them.
GATED_PROJ = FFNNames(gate="gate_proj", up="up_proj", down="down_proj")


@dataclass(frozen=True)
class MoENames:
    """Where an existing MoE keeps its experts (hierarchical conversion). Paths are relative to the decoder layer.

    The experts are ``experts.0``, ``experts.1`` ... of ``block``, named as in the model.

    Attributes:
        expert_count, expert_width: Keys of config.json. The count is also read under transformers' own names for it.
        block: Module of router and experts.
        names: Projections of one expert on disk.
        shared: An always-on expert beside them.
        shared_names: Its projections.
        shared_width: Key of its width, or what computes it. 0: the layers have none.
        sparse: Which layers have experts (``anatomy/sparse.py``); None: all. The others have an ordinary FFN, which is
            split as well.
        dense_names, dense_width: Projections of that FFN, and the key of its width where it is not ``Family.d_ff``.
    """

    expert_count: str
    expert_width: str
    block: str = "mlp"
    names: FFNNames = GATED_PROJ
    shared: str | None = None
    shared_names: FFNNames = GATED_PROJ
    shared_width: str | Callable[[Config], int] = ""
    sparse: Callable[[Config, int], bool] | None = None
    dense_names: FFNNames = GATED_PROJ
    dense_width: str | None = None


QKNorm = Literal["none", "head", "full"]
Norms = Literal["before", "after", "both"]
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")


@dataclass(frozen=True)
class Attention:
    """Attention as most families have it: q_proj, k_proj, v_proj and o_proj in ``self_attn``, with RoPE.

    Attributes:
        qkv_bias, o_bias: Whether these projections have biases: always, never, or as that key of config.json says.
        qk_norm: Norm of queries and keys: none, per head, or over all heads at once.
        head_dim: Width of a head where config.json does not say it; None: the model's width over the heads.
        fused: The first three are one matrix, ``qkv_proj`` (Phi-3).
        adjacent: RoPE rotates neighbouring coordinates, 2 i and 2 i + 1 (GLM), and not i and i + half.
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: QKNorm = "none"
    head_dim: int | None = None
    fused: bool = False
    adjacent: bool = False


@dataclass(frozen=True)
class Family:
    """All that is known of the models of one ``model_type``: where its FFNs are, and what stands beside them.

    Attributes:
        model_type: Of config.json.
        group: What blueprints and reports call the family, where several model types share a name (Gemma).
        layers: Module path of the decoder layers.
        ffn: Module of the FFN inside a decoder layer (``mlp``; OPT has none of its own and uses ``fc1``).
        names: Projections, relative to ``ffn`` ("" when ``ffn`` itself is the up projection, as in OPT).
        bypass: Submodules of the decoder layer that become the identity because the FFN module takes over their work.
        d_model, d_ff, num_layers, heads, activation: Keys of config.json.
        d_ff_of: Computes d_ff where the value of its key is not the whole story (GPT-2: 4 x n_embd without it).
        activation_of: Computes the activation where the value of its key is not the whole story (Gemma), or where there
            is no key (LFM2).
        prefix: Prefix of the base model's tensors; checkpoints without it are read as well.
        renames: Parts of tensor names that the checkpoint spells otherwise than the model: (on disk, in the model).
        buffers: Ends of names of tensors that old checkpoints hold and that are no weights (causal masks, rotary
            tables).
        layers_return_tuples: Its decoder layers return more than the hidden states (Falcon).
        refuse: Returns the reason why a config of this family cannot be converted, or None.
        moe: Set for families that are MoE already.
        attention: None where it is of another form: it is then neither pruned nor written for a stock architecture.
        norms: Where norms stand: before attention and FFN, after them, or both. After: the size of the FFN's output
            says nothing of what is added to the residual stream.
        ffn_bias: Whether the FFNs have biases: see :class:`Attention`. Only read for gated ones.
        multipliers: Whether it has the factors of Granite, under the keys in :data:`MULTIPLIERS`.
        residual_of: Computes what the FFN's output is multiplied by where that is no such key (MiniCPM3).
        beyond_stock: What no stock target has, beside what the other attributes say; None: nothing.
    """

    model_type: str
    group: str | None = None
    layers: str = "model.layers"
    ffn: str = "mlp"
    names: FFNNames = GATED_PROJ
    bypass: tuple[str, ...] = ()
    d_model: str = "hidden_size"
    d_ff: str = "intermediate_size"
    num_layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    activation: str | None = "hidden_act"
    d_ff_of: Callable[[Config], int] | None = None
    activation_of: Callable[[Config], str] | None = None
    prefix: str = "model"
    renames: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    layers_return_tuples: bool = False
    refuse: Callable[[Config], str | None] | None = None
    moe: MoENames | None = None
    attention: Attention | None = None
    norms: Norms = "before"
    ffn_bias: bool | str = False
    multipliers: bool = False
    residual_of: Callable[[Config], float] | None = None
    beyond_stock: str | None = None

    @property
    def name(self) -> str:
        """What blueprints and reports call the family."""
        return self.group or self.model_type

    def model_name(self, name: str) -> str:
        """A tensor's name in the model, given its name on disk (prefix included)."""
        for on_disk, in_model in self.renames:
            name = name.replace(on_disk, in_model)
        return name

    def disk_name(self, name: str) -> str:
        """The inverse of :meth:`model_name`."""
        for on_disk, in_model in reversed(self.renames):
            name = name.replace(in_model, on_disk)
        return name


@dataclass(frozen=True)
class FFNSite:
    """One FFN of one model.

    Attributes:
        path: Module path in the model, and the key in a blueprint: ``model.layers.3.mlp``.
        layer: Decoder layer index.
        expert: Index of the expert when the site is a routed expert of an existing MoE.
        d_ff: Neurons.
        names: Projection names relative to ``disk_path``.
        disk_path: Where its tensors are in the checkpoint; differs from ``path`` where transformers renames a block.
    """

    path: str
    layer: int
    d_ff: int
    names: FFNNames
    disk_path: str
    expert: int | None = None

    def tensor_names(self) -> dict[str, str]:
        """Checkpoint names by role (``gate``, ``up``, ``down``), without their suffixes."""
        roles = {"up": self.names.up, "down": self.names.down}
        if self.names.gate is not None:
            roles["gate"] = self.names.gate
        return {role: self._join(name) for role, name in roles.items()}

    def weight_name(self, role: str) -> str:
        """Checkpoint name of a projection's matrix."""
        return f"{self.tensor_names()[role]}{self.names.suffixes[0]}"

    def bias_name(self, role: str) -> str:
        """Checkpoint name of a projection's bias, which it need not have."""
        return f"{self.tensor_names()[role]}{self.names.suffixes[1]}"

    def learned_names(self) -> dict[str, str]:
        """Checkpoint names of the activation's own tensors, by their last part."""
        return {name.rpartition(".")[2]: self._join(name) for name in self.names.learned}

    def _join(self, name: str) -> str:
        # OPT: the site is fc1 itself, and its siblings are written "../fc2".
        if name.startswith("../"):
            return f"{self.disk_path.rpartition('.')[0]}.{name.removeprefix('../')}"
        return f"{self.disk_path}.{name}" if name else self.disk_path


@dataclass(frozen=True)
class Anatomy:
    """A :class:`Family` applied to one config: the sizes and the list of FFN sites of a model."""

    family: Family
    config: Config = field(repr=False)
    num_layers: int
    d_model: int
    d_ff: int
    activation: str
    sites: tuple[FFNSite, ...] = field(repr=False)

    @property
    def gated(self) -> bool:
        """Whether the FFNs have a gate path."""
        return self.sites[0].names.gated

    @property
    def norm_after(self) -> bool:
        """Whether a norm follows the FFN before its output is added to the residual stream."""
        return self.family.norms != "before"

    @property
    def residual_multiplier(self) -> float:
        """What the FFN's output is multiplied by before it is added to the residual stream (mostly 1)."""
        if self.family.residual_of is not None:
            return self.family.residual_of(self.config)
        return float(self.config.get("residual_multiplier", 1.0)) if self.family.multipliers else 1.0

    def sites_of(self, layer: int) -> tuple[FFNSite, ...]:
        """The FFN sites of one decoder layer (one for a dense model, several for a MoE)."""
        return tuple(site for site in self.sites if site.layer == layer)

    def unread(self, name: str) -> bool:
        """Whether transformers leaves out a tensor of that name: buffers of old checkpoints, and what predicts tokens
        further ahead (MTP): layers behind the last, or a part of its own."""
        ahead = self.config.get("num_nextn_predict_layers") or self.config.get("num_mtp_layers") or 0
        behind = tuple(f"{self.layer_path(self.num_layers + layer)}." for layer in range(ahead))
        return name.endswith(self.family.buffers) or name.startswith(("mtp.", "model.mtp.", *behind))

    def layer_path(self, layer: int) -> str:
        """Module path of a decoder layer."""
        return f"{self.family.layers}.{layer}"


def max_positions(config: Config) -> int | None:
    """Longest context of a model (or of a ``moesaic`` folder), in tokens; None where its config does not say."""
    config = config.get("text_config") or config
    return config.get("max_position_embeddings") or config.get("n_positions")


def vocabulary(config: Config) -> int | None:
    """Rows of the embedding of a model (or of a ``moesaic`` folder); None where its config does not say."""
    return (config.get("text_config") or config).get("vocab_size")


def clipped(window: int, config: Config) -> int:
    """A window of that many tokens, or of as many as the model reads."""
    return min(window, max_positions(config) or window)


def require(config: Config, key: str, model_type: str) -> Any:
    """``config[key]``, or an UnsupportedModelError that names the missing key."""
    if config.get(key) is None:
        raise UnsupportedModelError(
            f"config.json of this {model_type} model has no {key!r}", "the config is incomplete"
        )
    return config[key]
