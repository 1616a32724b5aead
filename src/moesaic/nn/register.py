"""Makes transformers know the `moesaic` architecture, without importing transformers or torch before the user does.

:func:`register` does it now. :func:`register_on_import` does it as soon as transformers' auto classes exist: at once if they
are imported, else through an import hook that runs after two modules of transformers and changes nothing else. A folder
loads the same without any of this, with ``trust_remote_code=True``; registered, it needs no remote code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
_MODEL_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register config and model with ``AutoConfig`` and ``AutoModelForCausalLM``. Imports transformers; may be called again."""
    importlib.import_module(_MODEL_MODULE)
    _register_config()
    _register_model()


def register_on_import() -> None:
    """Register when transformers' auto classes are imported, at once if they are. May be called again."""
    for module, action in _ACTIONS.items():
        if module in sys.modules:
            action()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_config() -> None:
    # Straight from the module, which may have been executed just now, while the package around it is still being imported.
    from transformers.models.auto.configuration_auto import AutoConfig

    from moesaic.nn.modeling_moesaic import MoesaicConfig

    AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
    MoesaicConfig.register_for_auto_class()


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from moesaic.nn.modeling_moesaic import MoesaicConfig, MoesaicForCausalLM

    AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
    # So that save_pretrained copies the modelling file into the folder and names it in config.json.
    MoesaicForCausalLM.register_for_auto_class("AutoModelForCausalLM")


_ACTIONS: dict[str, Callable[[], None]] = {_CONFIG_MODULE: _register_config, _MODEL_MODULE: _register_model}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the ordinary path finder find the two modules, and runs their action after their code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = _ACTIONS.get(fullname)
        if action is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec
