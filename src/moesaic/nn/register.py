"""Makes transformers know the `moesaic` architecture, by its public ``AutoConfig.register`` and its like.

transformers looks for architectures nowhere but in its own tables: no entry point or setting names others before it is
imported. So ``import moesaic``, which needs no torch, registers only where transformers is imported already; elsewhere
:func:`register` does. All of this package that loads a folder calls it. A folder loads the same without any of this,
with ``trust_remote_code=True``.
"""

from __future__ import annotations

import sys


def register() -> None:
    """Register with the Auto classes. Imports transformers; may be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from moesaic.nn.modeling_moesaic import MoesaicConfig, MoesaicForCausalLM, MoesaicForImageTextToText

    AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(MoesaicConfig, MoesaicForImageTextToText, exist_ok=True)
    # So that save_pretrained copies the modelling files into the folder and names them in config.json.
    MoesaicConfig.register_for_auto_class()
    MoesaicForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MoesaicForImageTextToText.register_for_auto_class("AutoModelForImageTextToText")


def register_if_imported() -> None:
    """:func:`register` where transformers is imported, else nothing."""
    if sys.modules.get("transformers") is not None:
        register()
