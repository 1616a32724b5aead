"""Makes transformers know the `moesaic` architecture, without importing transformers or torch before the user does.

:func:`register` does it now. :func:`register_on_import`, which ``import moesaic`` calls, does it as soon as
transformers' auto classes exist: at once if they are imported, else through an import hook. The hook watches imports of
transformers. When the outermost one is through (within it, half of transformers may be half imported) and the auto
classes are there, it registers and removes itself. A folder loads the same without any of this, with
``trust_remote_code=True``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto.configuration_auto"
_MODELING = ("moesaic.nn.modeling_moesaic", "moesaic.nn.moesaic_")  # what imports transformers while half imported


def register() -> None:
    """Register with ``AutoConfig`` and ``AutoModelForCausalLM``. Imports transformers; may be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from moesaic.nn.modeling_moesaic import MoesaicConfig, MoesaicForCausalLM

    AutoConfig.register(MoesaicConfig.model_type, MoesaicConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
    # So that save_pretrained copies the modelling files into the folder and names them in config.json.
    MoesaicConfig.register_for_auto_class()
    MoesaicForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def register_on_import() -> None:
    """Register at once if transformers' auto classes are imported, else when they are. May be called again."""
    if _AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _ImportWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatch())


class _ImportWatch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it asks the other finders and counts how deep imports of transformers are nested."""

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers" and not fullname.startswith(_MODELING):
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _ImportWatch))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader)
        return spec

    def _wrap(self, loader: importlib.abc.Loader) -> None:
        execute = loader.exec_module

        def execute_and_count(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and _AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        loader.exec_module = execute_and_count  # type: ignore[method-assign]
