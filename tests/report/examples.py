"""Facts of an invented output, for pages without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moesaic.report.facts import Facts, Layer

PROTOCOL = "ppl[wikitext2-raw/test w512 n=6]"
LAYERS = (
    Layer("model.layers.0.mlp", 100, converted=False),
    Layer("model.layers.1.mlp", 100, 20, 4, 1, (20, 20, 20, 20), "linear", "uniform", 40.0, 160),
    Layer("model.layers.2.mlp", 100, 20, 4, 1, (10, 20, 30, 20), "linear", "uniform", 50.0, 160),
)
MADE: dict[str, Any] = {
    "version": "1",
    "base_model": "acme/small-1b",
    "method": "cmoe",
    "config": {"layout": "S2A1E10"},
    "calibration": {"sources": [{"name": "/home/me/notes.txt"}], "tokens": 256},
    "source": "a" * 64,
    "blueprint": "b" * 64,
    "target": "moesaic",
}


def ratio(value: float) -> dict[str, float]:
    return {"ratio": value, "low": value - 0.02, "high": value + 0.02}


def evaluation(value: float) -> dict[str, Any]:
    return {
        "perplexity": {
            "dense": {"value": 20.0},
            "model": {"value": 20 * value, "ratio_to_dense": ratio(value)},
            "static": {"value": 40.0, "ratio_to_dense": ratio(2.0), "active_ffn_fraction": 0.45},
        },
        "active_ffn_fraction": 0.46,
        "fidelity": {
            "summary": {"overlap": 0.6, "dead_experts": 1.0},
            "sites": [
                {
                    "site": layer.path,
                    "tokens": 64,
                    "overlap": 0.6,
                    "chance": 0.25,
                    "energy_router": 0.7,
                    "energy_oracle": 0.8,
                    "load": [0.5, 0.3, 0.2, 0.0],
                    "load_entropy": 0.7,
                    "dead": 1,
                }
                for layer in LAYERS[1:]
            ],
        },
        "speed": {"dense": {"prefill": 100.0, "decode": 10.0}, "model": {"prefill": 90.0, "decode": 13.0}},
        "parameters_dense": 1_000_000,
    }


def sample() -> dict[str, Any]:
    tokens = ["The", " har", "bour", "</script>", "\n"]
    return {
        "tokens": tokens,
        "nll": [None, 2.0, 0.5, 9.0, 1.0],
        "nll_dense": [None, 1.5, 0.5, 8.0, 1.0],
        "sites": {
            layer.path: {
                "share": 0.4,
                "shares": [0.4, 0.5, 0.3, 0.4, 0.4],
                "choices": [[0], [1], [2], [0], [3]],
                "error": 0.1 * place,
            }
            for place, layer in enumerate(LAYERS[1:], 1)
        },
    }


def facts(name: str = "out", value: float = 1.2, **changes: Any) -> Facts:
    training = tuple(
        {"step": step, "loss": 3 - step / 10, "seconds": 1.0, "held_out": {"loss": 3.1 - step / 10}}
        for step in range(1, 9)
    )
    results = {"evaluation": {PROTOCOL: evaluation(value)}, "sample": sample()}
    config = {"model_type": "moesaic", "moesaic": MADE}
    made = Facts(name, config, results, LAYERS, 60, 1_100_000, 2_200_000, "bfloat16", training)
    return replace(made, **changes)
