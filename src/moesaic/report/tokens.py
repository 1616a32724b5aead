"""Which tokens use which experts: the sample text, coloured and explained by ``tokens.js``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report.facts import Facts
from moesaic.report.html import escape, note

_MODES = {"expert": "first expert", "share": "neurons used", "loss": "loss"}


def tokens(facts: Facts) -> list[str]:
    """The reader, or how to get it."""
    sample = facts.sample
    layers = [_layer(facts, path, site) for path, site in sample.get("sites", {}).items() if site.get("shares")]
    if not layers:
        return [
            note("Not read yet. `moesaic report OUT` runs the model on a short text and shows its tokens' experts.")
        ]
    modes = [mode for mode in _MODES if mode != "expert" or any(layer["choices"] for layer in layers)]
    dense = sample.get("nll_dense")
    names = _MODES | ({"loss": "loss over the dense model's"} if dense else {})
    options = "".join(f'<option value="{mode}">{names[mode]}</option>' for mode in modes)
    data = {"tokens": sample["tokens"], "nll": sample["nll"], "dense": dense, "layers": layers}
    text = "".join(_token(piece) for piece in sample["tokens"])
    return [
        note("Point at a token, or tap it, to see its experts in every layer. A click keeps it."),
        '<div class="routing"><div class="controls">'
        f'<label>colour by <select aria-label="colour by">{options}</select></label>'
        f'<label>layer <input type="range" min="0" max="{len(layers) - 1}" value="{len(layers) // 2}" '
        'aria-label="layer"> <output></output></label></div>'
        f'<div class="reader"><div><div class="text-body">{text}</div><div class="chips"></div></div>'
        '<aside class="panel" aria-live="polite">No token is chosen.</aside></div>'
        f'<script type="application/json">{_embedded(data)}</script></div>',
        note(_mean_loss(sample["nll"], dense)),
    ]


def _layer(facts: Facts, path: str, site: Mapping[str, Any]) -> dict[str, Any]:
    layer = next((layer for layer in facts.layers if layer.path == path), None)
    return {
        "name": path if layer is None else str(layer.index),
        "experts": 0 if layer is None else layer.experts,
        "choices": site.get("choices"),
        "share": site["shares"],
    }


def _token(text: str) -> str:
    shown = escape(text or "·").replace("\n", "↵\n")
    return f'<span class="token" tabindex="0">{shown}</span>'


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element, whatever the text holds."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _mean_loss(own: Sequence[float | None], dense: Sequence[float | None] | None) -> str:
    def mean(values: Sequence[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / max(len(known), 1)

    beside = "" if dense is None else f", the dense model's {mean(dense):.3f}"
    return f"Mean loss on this text: {mean(own):.3f} nats per token{beside}. One short text proves nothing."
