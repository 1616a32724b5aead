"""The `moesaic` architecture for transformers: a dense language model whose FFNs are split into experts.

This file and those that it imports relatively need torch and transformers only: they lie in every converted folder, so
that `trust_remote_code=True` works where moesaic is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

# All files of the architecture, used here or not: transformers up to 5.6 copies only those that this one names.
from .moesaic_activation import Scaled  # noqa: F401
from .moesaic_attention import swap_attention
from .moesaic_ffn import MoEFeedForward, MoesaicExperts, use_path
from .moesaic_kept import FEW  # noqa: F401
from .moesaic_kernel import kernel  # noqa: F401
from .moesaic_kernel_blocks import BLOCKS  # noqa: F401
from .moesaic_kernel_fused import FUSED  # noqa: F401
from .moesaic_kernel_nested import NESTED  # noqa: F401
from .moesaic_kernel_neurons import NEURONS  # noqa: F401
from .moesaic_kernel_source import ROWS  # noqa: F401
from .moesaic_kernel_tiles import TILES  # noqa: F401
from .moesaic_low_bit import LowBitRouter  # noqa: F401
from .moesaic_measured import measured  # noqa: F401
from .moesaic_nested import NestedFeedForward  # noqa: F401
from .moesaic_neurons import NeuronFeedForward
from .moesaic_operators import NAMESPACE  # noqa: F401
from .moesaic_path_fused import FusedMasked  # noqa: F401
from .moesaic_path_nested_rows import NestedRows  # noqa: F401
from .moesaic_path_neuron_rows import NeuronRows  # noqa: F401
from .moesaic_path_neurons import NeuronsMasked  # noqa: F401
from .moesaic_path_packed import Masked  # noqa: F401
from .moesaic_path_rows import Rows  # noqa: F401
from .moesaic_path_sorted import Sorted  # noqa: F401
from .moesaic_path_triton import TritonRows  # noqa: F401
from .moesaic_path_union import UnionMasked  # noqa: F401
from .moesaic_paths import PATHS  # noqa: F401
from .moesaic_routing import Router  # noqa: F401
from .moesaic_side_by_side import lay  # noqa: F401
from .moesaic_slices import Matrices  # noqa: F401
from .moesaic_union import build_feed_forward

if TYPE_CHECKING:  # named, so that it is copied; imported where a GPU computes, as it needs Triton
    from .moesaic_triton import rows_hidden  # noqa: F401


class MoesaicConfig(PreTrainedConfig):
    """Config of a converted model.

    Args:
        text_config: Config of the dense model, as a dict with its `model_type` or as a config object.
        ffn_sites: Module path of each converted FFN -> its spec (shapes and switches, see :class:`MoEFeedForward`).
        ffn_bypass: Siblings of a converted FFN that become the identity, as it does their work (OPT's `fc2`).
        attention_sites: Module path of each pruned attention -> its spec (see :class:`PrunedAttention`).
        ffn_activation: The FFNs' activation where the dense model's config does not name it (LFM2, Falcon-H1).
        exact_prefill: FFNs whose every neuron is an expert compute prompts and large batches by the dense network, and
            only the tokens of few sequences, one by one, by the chosen neurons. False: all tokens by the chosen ones,
            as perplexity is to be measured.
        whole_config: Config of the multimodal model around the dense one, where the folder holds all of it.
    """

    model_type = "moesaic"
    sub_configs = {"text_config": PreTrainedConfig, "whole_config": PreTrainedConfig}  # type: ignore[assignment]  # noqa: RUF012
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
        attention_sites: dict[str, dict[str, Any]] | None = None,
        ffn_activation: str | None = None,
        exact_prefill: bool = True,
        whole_config: dict[str, Any] | PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config: PreTrainedConfig = text_config
        self.ffn_sites = dict(ffn_sites or {})
        self.ffn_bypass = list(ffn_bypass)
        self.attention_sites = dict(attention_sites or {})
        self.ffn_activation = ffn_activation
        self.exact_prefill = exact_prefill
        if isinstance(whole_config, dict):
            whole_config = CONFIG_MAPPING[whole_config["model_type"]].from_dict(whole_config)
        if whole_config is not None:
            self.whole_config = whole_config
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "whole_config":  # so that config.json has the key only where there is one
            return None
        if name in type(self)._dense_attributes and "text_config" in self.__dict__:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


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
        setattr(parent, name, build_feed_forward(spec, d_model, activation))
        for sibling in bypass:
            setattr(parent, sibling, nn.Identity())


def activation_name(config: PreTrainedConfig) -> str:
    """Name of the FFN's activation in a dense model's config."""
    for key in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        if (name := getattr(config, key, None)) is not None:
            return name
    raise ValueError(f"no activation in the config of {config.model_type}")


_IN_FP32 = [
    r"\.router\.(?:weight|reduce|bias|up|gate|up_bias|gate_bias|norm|threshold)$",
    r"\.selection_bias$",
    r"(?<!\.router)\.gate_scale$",  # a low-bit router's is bf16
    r"\.value_mask\.",
]


class _Switches:
    """What a model has with converted FFNs, and no other."""

    def use_path(self, *names: str) -> AbstractContextManager[None]:
        """Within the block, FFNs compute by the first of these paths that supports the input; see `moesaic_ffn.py`."""
        return use_path(self, *names)  # type: ignore[arg-type]

    def all_experts_on(self, on: bool = True) -> None:
        """Switch routing off in every converted FFN (all experts, unit weights), or on again. For parity checks."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, MoEFeedForward):
                module.all_experts_on = on

    def exact_prefill(self, on: bool = True) -> None:
        """Whether prompts are computed by the dense network: see :class:`MoesaicConfig`. Others than FFNs whose every
        neuron is an expert have no such choice."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, NeuronFeedForward):
                module.exact_prefill = on


class MoesaicForCausalLM(_Switches, PreTrainedModel, GenerationMixin):
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
    _keep_in_fp32_modules_strict = _IN_FP32

    def __init__(self, config: MoesaicConfig) -> None:
        super().__init__(config)
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        text_config = config.get_text_config()
        dense: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
        dense = dense(text_config)
        activation = config.ffn_activation or activation_name(text_config)
        swap_ffns(dense, config.ffn_sites, config.ffn_bypass, config.hidden_size, activation)
        swap_attention(dense, config.attention_sites)
        self.__dict__["_dense"] = dense
        self.__dict__["_modules"] = dense._modules
        self.base_model_prefix = dense.base_model_prefix
        self._tied_weights_keys = dense._tied_weights_keys
        self.exact_prefill(config.exact_prefill)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any
    ) -> MoesaicForCausalLM:
        """See transformers, which renames GPT-NeoX's head between disk and model only for its own class.

        Raises ValueError for the folder of a multimodal model, whose tensors have other names.
        """
        folder = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if folder is not None and getattr(kwargs.get("config"), "whole_config", None) is not None:
            raise ValueError(f"{folder} is a multimodal model: load it with AutoModelForImageTextToText")
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
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What the dense family's forward takes and returns; transformers calls the cache ``cache`` since 5.24."""
        given = {"past_key_values": past_key_values, "cache": cache}
        kwargs |= {name: kept for name, kept in given.items() if kept is not None}
        return self._dense(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._dense.prepare_inputs_for_generation(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the modules are transformers' own, whose tables transformers then fills as in the dense model."""
        return False

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._dense._supports_default_dynamic_cache()  # MiniMax has a cache of its own

    def get_input_embeddings(self) -> nn.Module:
        return self._dense.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self._dense.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._dense.set_output_embeddings(new_embeddings)


class MoesaicForImageTextToText(PreTrainedModel):
    """Loads a multimodal model whose text model is converted: as its own class, with other FFNs.

    What `from_pretrained` returns is of a subclass of that class, and its config is of that class's config. Only this
    name of it stands in config.json, for `AutoModelForImageTextToText`.
    """

    config_class = MoesaicConfig

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """See transformers."""
        config = config if isinstance(config, MoesaicConfig) else MoesaicConfig.from_pretrained(name)
        return _converted(config).from_pretrained(name, *args, config=config.whole_config, **kwargs)

    @classmethod
    def _from_config(cls, config: MoesaicConfig, **kwargs: Any) -> Any:
        return _converted(config)._from_config(config.whole_config, **kwargs)


_OF_HUB = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def _converted(config: MoesaicConfig) -> Any:
    """The multimodal model's own class, with converted FFNs in its text model.

    Raises ValueError for a model of text alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if config.whole_config is None:
        raise ValueError("this is a model of text alone: load it with AutoModelForCausalLM")
    dense: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config.whole_config)]
    text_config = config.get_text_config()
    sites = {path.removeprefix("model."): spec for path, spec in config.ffn_sites.items()}
    activation = config.ffn_activation or activation_name(text_config)

    class Converted(_Switches, dense):
        _keep_in_fp32_modules_strict = [*(dense._keep_in_fp32_modules_strict or []), *_IN_FP32]  # noqa: RUF012

        def __init__(self, whole_config: PreTrainedConfig) -> None:
            dense.__init__(self, whole_config)
            swap_ffns(self.get_decoder(), sites, config.ffn_bypass, text_config.hidden_size, activation)
            self.exact_prefill(config.exact_prefill)
            self.post_init()

        def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
            """See transformers. config.json is that of the conversion, by which the folder is loaded."""
            of_hub = {name: kwargs.pop(name) for name in _OF_HUB if name in kwargs}
            super().save_pretrained(save_directory, *args, **kwargs)
            config.dtype = self.dtype
            config.save_pretrained(save_directory)
            if push_to_hub:  # writes anew, and sends what is written here
                self.push_to_hub(**{"repo_id": Path(save_directory).name} | of_hub)

    # transformers finds by name and module how old files of this class spell their tensors.
    Converted.__name__, Converted.__qualname__ = dense.__name__, dense.__qualname__
    Converted.__module__ = dense.__module__
    return Converted
