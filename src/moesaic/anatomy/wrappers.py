"""Multimodal wrappers whose text model is converted: which they are, and what its tensors are called in them.

Where there is only text, each of them computes what its text model computes (tests/checkpoint/test_wrappers.py). No
torch here: :mod:`moesaic.checkpoint.text_model` reads their configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moesaic.anatomy.base import Config
from moesaic.errors import UnsupportedModelError

WRAPPERS = (
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
    "vipllava",
)
"""``model_type`` of config.json."""

ANY_TEXT = (
    "aya_vision",
    "cohere2_vision",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "smolvlm",
    "vipllava",
)
"""Those whose class builds whatever text model their config names: a stock MoE as well."""

PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that have no class of their own -> what computes the same. Their rotary positions count text, height and
width; without images the three are equal, and so the positions are the plain ones."""

CHANGED = {
    "gemma3n": "its text model has layers of its own kind",
    "mllama": "layers of its text model attend to the image",
    "paligemma": "its text model reads the prompt in both directions",
}
"""Wrappers that are refused -> why."""

LOGITS = {"logit_scale": 1, "logits_scaling": 1, "final_logit_softcapping": None}
"""What a text model of its own does to the logits, as its config says -> without effect. Of the wrappers only Gemma 4
does it."""
CHANGES_LOGITS = ("gemma4",)

HEAD = "lm_head.weight"
_TEXT = "model."
_SPELLINGS = (
    (re.compile(r"language_model\.(model\..+|lm_head\..+)"), ""),  # transformers 4: a causal model inside
    (re.compile(r"model\.language_model\.(lm_head\..+)"), ""),
    (re.compile(r"model\.(?:language_model|text_model)\.(.+)"), _TEXT),
    (re.compile(r"((?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+)"), ""),  # Qwen2-VL
)
"""A name in the wrapper, with a group around its end -> what stands before that end in the text model."""


WHOLE_CONFIG = "whole_config"
"""Key of a conversion in place, in its config.json: the wrapper's config.json as it was."""


@dataclass(frozen=True)
class Whole:
    """A wrapper as a conversion in place sees it.

    Attributes:
        config: Its config.json.
        names: The text model's tensors: their names there -> in the wrapper.
        carried: Tensors of its other parts.
    """

    config: Config
    names: Mapping[str, str]
    carried: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """Of the wrapper."""
        return str(self.config["model_type"])

    @property
    def takes_stock(self) -> bool:
        """Whether its class builds a text model of a stock MoE architecture."""
        return self.model_type in ANY_TEXT

    def spelt(self, name: str) -> str:
        """The name in the wrapper of a tensor of the text model, of one that a conversion adds as well."""
        if name in self.names:
            return self.names[name]
        known = next(name for name in self.names if name.startswith(_TEXT))
        body = self.names[known].removesuffix(known.removeprefix(_TEXT))
        if name.startswith(_TEXT):
            return body + name.removeprefix(_TEXT)
        outside = body.removesuffix(_TEXT)  # of language_model.model. as transformers 4 spells it
        return outside + name if body != outside else name


def wrapper_of(config: Config) -> str | None:
    """The wrapper's ``model_type`` where the text model of this config.json is read in its place; else None."""
    model_type = config.get("model_type")
    return model_type if model_type in WRAPPERS else None


def whole_config(config: Config) -> Config | None:
    """The wrapper's config, of a wrapper or of a conversion in place; else None."""
    inside = config.get(WHOLE_CONFIG, config)
    return inside if isinstance(inside, Mapping) and wrapper_of(inside) else None


def text_names(stored: Iterable[str]) -> dict[str, str]:
    """The text model's tensors: their names there -> in the wrapper. Tensors of the other parts are left out.

    Raises UnsupportedModelError where two tensors have the same name.
    """
    names: dict[str, str] = {}
    for on_disk in stored:
        found = ((spelling.fullmatch(on_disk), before) for spelling, before in _SPELLINGS)
        name = next((before + match[1] for match, before in found if match), None)
        if name is None:
            continue
        if name in names:
            raise UnsupportedModelError(
                f"tensors {names[name]} and {on_disk} are both {name} of the text model",
                "load the model with transformers and save_pretrained: that leaves out what it does not read",
            )
        names[name] = on_disk
    return names


def parts(stored: Iterable[str]) -> tuple[str, ...]:
    """Modules of a wrapper that tensors belong to: ``visual``, ``model.vision_tower``."""
    found = (re.match(r"(model\.)?[^.]+", name) for name in stored)
    return tuple(sorted({match[0] for match in found if match}))
