"""docs/families.md: every model type of which transformers builds a causal language model, and what moesaic does of it.

    python -m benchmarks.families_page

A model type that stands nowhere is new in transformers. The page and the command name it, and a test fails: describe it
(CONTRIBUTING.md), or say in ``anatomy/others.py`` why not.
"""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import TINY, tiny_config

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy, Family, MoENames
from moesaic.anatomy.others import KINDS
from moesaic.anatomy.wrappers import ANY_TEXT, CHANGED, PLAIN, WRAPPERS
from moesaic.targets import TARGETS
from moesaic.targets.backbone import no_backbone
from moesaic.targets.limits import Limits

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
_HEAD = """# Model families

Every model type of which transformers {version} builds a causal language model. `python -m benchmarks.families_page`
writes this page from the tables, and a test wants it current. [How to add a family](../CONTRIBUTING.md#add-a-family).
"""
_DENSE = """
## Dense models that can be converted

All methods split them, and the `moesaic` architecture holds them. *ToMoE prunes* says what of the attention that
method may remove besides. *Stock architectures* are those that hold the family's layers. A switch of a config can stand
in the way, such as a sliding window or a bias; `moesaic plan --target NAME` says so.

| model type | FFN | ToMoE prunes | stock architectures, or why none |
|---|---|---|---|
"""
_MOE = """
## Mixtures of Experts whose experts can be split (`--hierarchical`)

Each expert is split as a dense FFN is, and so are a shared expert and the FFNs of dense layers. Only the `moesaic`
architecture holds the result. *On disk*: whether each expert has matrices of its own, or all of a layer are one tensor.
*Shared expert* and *dense layers*: whether a config of the family can have them.

| model type | on disk | shared expert | dense layers |
|---|---|---|---|
"""
_NEW = """
## New in transformers

{names}: nobody has looked at them yet. Describe them, or say in `anatomy/others.py` why not.
"""
_WRAPPERS = """
## Multimodal wrappers whose text model is converted

{wrappers}: [how](checkpoints.md#multimodal-models).

Each is converted in place with `--whole`: all else is carried unchanged, and the result reads images. Without, the
output is the text model alone. A stock architecture stays inside {any_text}: their classes build
whatever text model config.json names. The others build one class only, so that there the `moesaic` architecture holds
it, or a stock one the text model alone.

The text model, `text_config` in config.json, must be of a family above; {plain}.
"""


def model_types() -> tuple[list[str], list[str]]:
    """Of transformers' causal language models: those that are models of text, and wrappers around one."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    named = {name for kind in KINDS for name in kind.model_types}
    wrappers = [name for name in names if name not in named and _wraps(CONFIG_MAPPING[name])]
    return [name for name in names if name not in wrappers], wrappers


def _wraps(config: type) -> bool:
    """Whether a config has parts for text, pictures or sound."""
    return bool(getattr(config, "sub_configs", None))


def unknown() -> list[str]:
    """Model types that are neither a family nor refused with a reason."""
    named = {name for kind in KINDS for name in kind.model_types}
    return [name for name in model_types()[0] if name not in named and name not in FAMILIES]


def page() -> str:
    """The page's text."""
    import transformers

    texts, wrappers = model_types()
    dense = [family for family in FAMILIES.values() if family.moe is None]
    parts = [_HEAD.format(version=transformers.__version__), _DENSE]
    parts += [f"| {family.model_type} | {_ffn(family)} | {_prunes(family)} | {_stock(family)} |\n" for family in dense]
    parts += [_MOE, *(_moe(family, family.moe) for family in FAMILIES.values() if family.moe)]
    plain = ", ".join(f"`{text}` counts as `{family}`" for text, family in PLAIN.items())
    parts.append(_WRAPPERS.format(wrappers=_listed(list(WRAPPERS)), any_text=_listed(list(ANY_TEXT)), plain=plain))
    for status, title in (("possible", "Possible"), ("refused", "Refused")):
        parts.append(f"\n## {title}\n")
        for kind in KINDS:
            names = [name for name in texts if name in kind.model_types]
            if kind.status == status and names:
                parts.append(f"\n{_listed(names)}: {_sentence(kind.reason)}.\n")
    parts += [f"\n`{name}`: multimodal wrapper, and {reason}.\n" for name, reason in CHANGED.items()]
    others = [name for name in wrappers if name not in WRAPPERS and name not in CHANGED]
    parts.append(f"\n{_listed(others)}: multimodal wrappers that nobody has described yet.\n")
    if new := unknown():
        parts.append(_NEW.format(names=_listed(new)))
    return "".join(parts)


def _moe(family: Family, moe: MoENames) -> str:
    disk = "one tensor" if moe.names.stacked else "one by one"
    shared, dense = ("no" if fact is None else "yes" for fact in (moe.shared, moe.sparse))
    return f"| {family.model_type} | {disk} | {shared} | {dense} |\n"


def _sentence(reason: str) -> str:
    return reason.removeprefix("is ").removeprefix("a ").removeprefix("an ")


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _ffn(family: Family) -> str:
    if family.names.fused:
        return "gated, gate and up in one matrix"
    return "gated" if family.names.gated else "ungated"


def _prunes(family: Family) -> str:
    rows = {tiny.prunes for tiny in TINY.values() if tiny.model_type == family.model_type}
    words = {"pairs": "queries, keys and values", "values": "values", "nothing": "nothing"}
    return words[next(name for name in words if name in rows)]


def _stock(family: Family) -> str:
    row = next(name for name, tiny in TINY.items() if tiny.model_type == family.model_type)
    anatomy = read_anatomy(tiny_config(row).to_dict())
    held = [name for name, target in TARGETS.items() if target.limits and _holds(target.limits, anatomy)]
    if held:
        return ", ".join(held)
    if not family.names.gated:
        return "none: no gate"
    return f"none: {(family.beyond_stock or 'other attention or norms').rstrip(',')}"


def _holds(limits: Limits, anatomy: Anatomy) -> bool:
    """Whether an architecture holds a family's layers, as far as no switch of a config decides it."""
    family = anatomy.family
    norms = family.attention is not None and family.attention.qk_norm in limits.qk_norm
    norms = norms and (family.norms == "after") == limits.post_norm
    if no_backbone(anatomy) or not norms or (family.multipliers and not limits.multipliers):
        return False
    assert family.attention is not None
    return limits.qkv_bias or family.attention.qkv_bias is not True


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"new in transformers: {', '.join(unknown()) or 'nothing'}")
