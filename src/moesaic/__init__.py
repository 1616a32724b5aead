"""moesaic: turn one dense LLM checkpoint into a Mixture-of-Experts checkpoint, and measure what it cost.

The public names are resolved on first use, so that ``import moesaic`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:
    from moesaic.blueprint.layer import LayerPlan, Router
    from moesaic.blueprint.layout import Layout
    from moesaic.blueprint.model import Blueprint
    from moesaic.calibration.config import CalibrationConfig
    from moesaic.errors import MoesaicError
    from moesaic.jobs.convert import convert
    from moesaic.jobs.evaluate import evaluate_model
    from moesaic.jobs.export import export
    from moesaic.jobs.plan import plan
    from moesaic.jobs.undo import undo
    from moesaic.jobs.verify import verify_output as verify
    from moesaic.nn.register import register

_PUBLIC = {
    "Blueprint": "moesaic.blueprint.model:Blueprint",
    "CalibrationConfig": "moesaic.calibration.config:CalibrationConfig",
    "Layout": "moesaic.blueprint.layout:Layout",
    "LayerPlan": "moesaic.blueprint.layer:LayerPlan",
    "MoesaicError": "moesaic.errors:MoesaicError",
    "Router": "moesaic.blueprint.layer:Router",
    "convert": "moesaic.jobs.convert:convert",
    "evaluate_model": "moesaic.jobs.evaluate:evaluate_model",
    "export": "moesaic.jobs.export:export",
    "plan": "moesaic.jobs.plan:plan",
    "register": "moesaic.nn.register:register",
    "undo": "moesaic.jobs.undo:undo",
    "verify": "moesaic.jobs.verify:verify_output",
}
__all__ = [
    "Blueprint",
    "CalibrationConfig",
    "LayerPlan",
    "Layout",
    "MoesaicError",
    "Router",
    "convert",
    "evaluate_model",
    "export",
    "plan",
    "register",
    "undo",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _version() -> str:
    """That of the installed package, which is the tag's; of a bare source tree nothing is known."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("moesaic")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


from moesaic.nn.register import register_if_imported  # noqa: E402  (standard library only; needs the names above)

register_if_imported()
