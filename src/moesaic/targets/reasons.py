"""Why a split model does not fit into an architecture, and which others have what is missing. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.shape import FFNShape
from moesaic.targets.backbone import Backbone, no_backbone, read_backbone
from moesaic.targets.base import Split
from moesaic.targets.limits import Limits


def written_reasons(anatomy: Anatomy, limits: Limits) -> list[str]:
    """:func:`backbone_reasons` by what config.json says, without transformers; defaults that it lacks are unseen."""
    if reason := no_backbone(anatomy):
        return [reason]
    return list(_backbone_reasons(read_backbone(anatomy, as_written=True), limits))


def backbone_reasons(anatomy: Anatomy, limits: Limits) -> list[str]:
    """What of attention, norms and embeddings does not fit; [] if all does. Imports transformers."""
    if reason := no_backbone(anatomy):
        return [reason]
    return list(_backbone_reasons(read_backbone(anatomy), limits))


def layer_reasons(split: Split, limits: Limits) -> list[str]:
    """What of the split FFNs and pruned attentions does not fit; [] if all does, or nothing is decided yet."""
    if no_backbone(split.anatomy):  # that is reason enough
        return []
    reasons = own_reasons(split)
    if split.shapes:
        reasons += _layer_reasons(split, limits)
        shapes = {path: shape for path, shape in split.shapes.items() if shape.experts}
        for check in (_width_reason, _router_reason, _gate_reason, _selection_reason):
            reasons += _grouped(shapes.items(), lambda shape, check=check: check(shape, limits))
        reasons += _grouped(split.shapes.items(), lambda shape: _bias_reason(shape, limits))
    return reasons


def own_reasons(split: Split) -> list[str]:
    """Why only target moesaic holds what is planned beside the FFNs; [] if nothing is."""
    if split.whole is not None and not split.whole.takes_stock:
        return [f"the text model stays in its {split.whole.model_type}: only target moesaic holds that"]
    if not split.attention:
        return []
    more = f" and {len(split.attention) - 1} more" if len(split.attention) > 1 else ""
    return [f"{next(iter(split.attention))}{more}: the attention is pruned: only target moesaic computes that"]


def _holders(fits: Callable[[Limits], bool]) -> str:
    """The targets whose limits have something, for a hint."""
    from moesaic.targets import TARGETS

    names = [name for name, target in TARGETS.items() if target.limits is not None and fits(target.limits)]
    return f"{', '.join(names)} {'have' if len(names) > 1 else 'has'}" if names else "no target has"


def _backbone_reasons(backbone: Backbone, limits: Limits) -> Iterable[str]:
    if backbone.qkv_bias and not limits.qkv_bias:
        yield f"query, key and value have biases, which it has not: {_holders(lambda other: other.qkv_bias)} them"
    if backbone.o_bias and not limits.o_bias:
        yield f"the attention output has a bias, which it has not: {_holders(lambda other: other.o_bias)} one"
    if backbone.qk_norm not in limits.qk_norm:
        holders = _holders(lambda other: backbone.qk_norm in other.qk_norm)
        yield f"norm of queries and keys is {backbone.qk_norm!r}, its own {' or '.join(limits.qk_norm)!r}: {holders} it"
    if backbone.post_norm != limits.post_norm:
        places = {True: "after", False: "before"}
        holders = _holders(lambda other: other.post_norm == backbone.post_norm)
        own = places[limits.post_norm]
        yield f"norms stand {places[backbone.post_norm]} attention and FFN, its own {own}: {holders} them so"
    if not backbone.natural_head_dim and not limits.any_head_dim:
        holders = _holders(lambda other: other.any_head_dim)
        yield f"head_dim is {backbone.head_dim}, not hidden_size / heads: {holders} heads of any width"
    if backbone.partial_rotary != 1.0 and not limits.partial_rotary:
        holders = _holders(lambda other: other.partial_rotary)
        yield f"partial_rotary_factor is {backbone.partial_rotary:g}, it rotates whole heads: {holders} partial ones"
    if backbone.window is not None and not (limits.window and backbone.window_everywhere):
        where = "every layer" if backbone.window_everywhere else "some layers"
        holders = _holders(lambda other: other.window)
        yield f"sliding window of {backbone.window} tokens in {where}: {holders} one in every layer"
    if not backbone.plain_multipliers and not limits.multipliers:
        holders = _holders(lambda other: other.multipliers)
        yield f"the model has multipliers (embedding, residual, logits or attention): {holders} them"
    if backbone.ffn_bias:
        yield "the FFNs have biases (mlp_bias): no stock expert has any"


def _layer_reasons(split: Split, limits: Limits) -> Iterable[str]:
    dense = split.dense_layers
    if len(dense) == split.anatomy.num_layers:
        yield "no FFN has routed experts: target dense holds it"
        return
    names = ", ".join(str(layer) for layer in dense[:5]) + (" ..." if len(dense) > 5 else "")
    if dense and limits.dense_layers == "none":
        leading = _holders(lambda other: other.dense_layers == "leading")
        anywhere = _holders(lambda other: other.dense_layers == "any")
        yield f"layers {names} stay dense, its layers have experts: {leading} leading dense ones, {anywhere} any"
    if limits.dense_layers == "leading" and dense != list(range(len(dense))):
        holders = _holders(lambda other: other.dense_layers == "any")
        yield f"layers {names} stay dense, it takes them at the start only: {holders} them anywhere"
    sizes = sorted({(shape.experts, shape.top_k) for shape in split.routed})
    if len(sizes) > 1 and not limits.unequal_layers:
        text = ", ".join(f"top-{k} of {n}" for n, k in sizes[:4])
        holders = _holders(lambda other: other.unequal_layers)
        yield f"layers differ in experts and top-k ({text}): {holders} unequal ones"


def _width_reason(shape: FFNShape, _limits: Limits) -> str | None:
    if shape.varied:
        return "experts of different widths: it would compute the widest for every token; convert with widths=equal"
    return None


def _router_reason(shape: FFNShape, limits: Limits) -> str | None:
    if shape.router == "low_bit":
        return "every neuron is an expert, which a copy of the FFN in a few bits chooses: no stock router does that"
    if shape.router == "gated":
        return "router of kind 'gated': only linear ones exist there; convert with --router oracle"
    if shape.router_bias and not shape.all_on:
        if not (limits.router_bias and shape.weighs_one):
            holders = _holders(lambda other: other.router_bias)
            return f"the router has a bias: {holders} one where weights are 1; elsewhere fit the router without bias"
        if shape.normalised:
            return "router with a bias on normalised inputs: no stock router normalises its input"
    if shape.normalised and not shape.weighs_one:
        return "weights from a router on normalised inputs: no stock router normalises its input; use gate 'uniform'"
    return None


def _gate_reason(shape: FFNShape, limits: Limits) -> str | None:
    if shape.weighs_one or (shape.gate == "softmax_topk" and limits.softmax_topk):
        return None
    if shape.gate == "sigmoid":
        return None if limits.sigmoid else f"gate 'sigmoid': {_holders(lambda other: other.sigmoid)} it"
    if shape.gate == "scaled":
        return "gate 'scaled' with trained scales: no stock architecture has weights 1 + p s; use gate 'softmax_topk'"
    return f"gate 'softmax_topk': {_holders(lambda other: other.softmax_topk)} it"


def _selection_reason(shape: FFNShape, limits: Limits) -> str | None:
    if not shape.selection_bias or (shape.gate == "sigmoid" and limits.sigmoid):
        return None
    if shape.gate == "sigmoid":
        return f"a selection bias on the sigmoid of the scores: {_holders(lambda other: other.sigmoid)} one"
    as_softmax = shape.router in ("linear", "low_rank") and not shape.router_bias and not shape.normalised
    if limits.selection_bias and as_softmax and (shape.top_k == 1 or shape.gate == "softmax_topk"):
        return None
    return (
        f"a selection bias on the softmax of the scores: {_holders(lambda other: other.selection_bias)} one, with gate "
        "'softmax_topk' or top-1; a linear router fitted to the decisions (--router decisions) contains it"
    )


def _bias_reason(shape: FFNShape, limits: Limits) -> str | None:
    if not shape.output_bias or limits.output_bias:
        return None
    return f"the FFN's output has a bias: {_holders(lambda other: other.output_bias)} one (transformers only)"


def _grouped(shapes: Iterable[tuple[str, FFNShape]], check: Callable[[FFNShape], str | None]) -> list[str]:
    """Each distinct reason once, with the first FFN that it concerns and the number of the others."""
    paths: dict[str, list[str]] = {}
    for path, shape in shapes:
        if reason := check(shape):
            paths.setdefault(reason, []).append(path)
    return [
        f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {reason}"
        for reason, found in paths.items()
    ]
