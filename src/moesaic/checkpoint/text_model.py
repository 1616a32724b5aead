"""The config.json of the text model in a multimodal wrapper (:mod:`moesaic.anatomy.wrappers`)."""

from __future__ import annotations

import copy
import json
from typing import Any

from moesaic.anatomy.base import Config
from moesaic.anatomy.wrappers import CHANGES_LOGITS, LOGITS, PLAIN
from moesaic.checkpoint.head import FLAG
from moesaic.errors import CheckpointError, UnsupportedModelError

_OF_ALL = ("quantization_config", "compression_config", "_name_or_path", "license")
"""Keys that the wrapper states for all of its weights. In the text model's own config they may speak of another one."""
_INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")
"""Keys that the wrapper may state for its text model, and that go before what the text model's config says."""
_OF_IMAGES = ("mrope_section", "mrope_interleaved", "type")
"""Of the rotary positions, what only positions in images need."""


def text_config(config: Config, *, own_head: bool | None = None) -> dict[str, Any]:
    """The config.json that the text model has as a checkpoint of its own.

    transformers reads the wrapper's: the class of each knows the defaults of what is not stated, and old spellings.

    Args:
        config: Of a wrapper.
        own_head: Whether the weights have an output head. Where they have none, it is the embeddings, whatever the
            config says. None: not known yet.

    Raises:
        CheckpointError: transformers cannot read the config.
        UnsupportedModelError: this version of transformers does not know the wrapper, or the wrapper does not compute
            what its text model computes.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    read = _read(config)
    usual = PreTrainedConfig().to_dict()
    left_out = {"transformers_version", "architectures", *_OF_ALL}
    values = {key: read[key] for key in read if key not in left_out and (key not in usual or read[key] != usual[key])}
    own = config.get("text_config") or {}
    for key in _INHERITED:
        found = (part.get(spelt) for part in (config, own) for spelt in (key, f"torch_{key}"))
        if (value := next((value for value in found if value is not None), None)) is not None:
            values[key] = value
    values |= {key: config[key] for key in _OF_ALL if key in config}
    if "moesaic" in config:  # a conversion in place: what it says of itself, and who wrote it
        values |= {key: config[key] for key in ("moesaic", "transformers_version") if key in config}
    values[FLAG] = own_head is False or bool(config.get(FLAG, read.get(FLAG)))
    if name := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(read["model_type"]):
        values["architectures"] = [name]
    return values


def _read(config: Config) -> dict[str, Any]:
    """All values of the text model's config, of the class that computes the same without images."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    wrapper = config["model_type"]
    if wrapper not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"this version of transformers does not know {wrapper}", "upgrade transformers")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its advice on the config is not for the one who converts
    try:
        text: Any = CONFIG_MAPPING[wrapper].from_dict(copy.deepcopy(dict(config))).get_text_config()
        if text.model_type in PLAIN:
            text = CONFIG_MAPPING[PLAIN[text.model_type]].from_dict(_without_images(text.to_dict()))
        read: dict[str, Any] = text.to_dict()
    except Exception as error:  # what a bad value raises is up to each class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"transformers cannot read the config.json of this {wrapper} model: {reason}", "is it complete?"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    changed = next((key for key in LOGITS if read.get(key) not in (None, LOGITS[key])), None)
    if changed is not None and wrapper not in CHANGES_LOGITS:
        raise UnsupportedModelError(
            f"{wrapper} computes logits without {changed} = {read[changed]} of its text model {read['model_type']}",
            f"set {changed} in text_config to {json.dumps(LOGITS[changed])}, which is what {wrapper} does",
        )
    return read


def _without_images(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config for the plain class."""
    rope = values.get("rope_parameters") or {}
    kept = {key: value for key, value in rope.items() if key not in _OF_IMAGES}
    return {key: value for key, value in values.items() if key != "model_type"} | {"rope_parameters": kept}
