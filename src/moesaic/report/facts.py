"""What a page is made of: one converted folder in numbers and words, gathered by :mod:`moesaic.jobs.report`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

_NUMBER = re.compile(r"\.(\d+)\.")
_PROTOCOL = re.compile(r"ppl\[(?P<text>.+) w(?P<window>\d+) n=(?P<count>\w+)( (?P<dtype>\w+))?\]")
DENSE, MODEL = "dense", "model"
"""Labels of an evaluation's rows; all others are controls and references."""


@dataclass(frozen=True)
class Layer:
    """One FFN of the output.

    Attributes:
        path: Module path.
        d_ff: Neurons of the dense FFN.
        shared, experts, top_k: Neurons that are always on, routed experts, and how many a token uses.
        widths: Neurons of each routed expert; () where every neuron is one.
        router, gate: Kinds.
        active: Neurons that a token uses, as planned.
        router_bytes: What a token reads of the router.
        neuron_bytes: What it reads of one neuron, where that is not what it reads of a dense one's.
        converted: False for an FFN that stayed dense.
    """

    path: str
    d_ff: int
    shared: int = 0
    experts: int = 0
    top_k: int = 0
    widths: tuple[int, ...] = ()
    router: str = ""
    gate: str = ""
    active: float = 0.0
    router_bytes: int = 0
    neuron_bytes: float | None = None
    converted: bool = True

    @property
    def index(self) -> int:
        """Number of the decoder layer: the first number of the path."""
        found = _NUMBER.search(f"{self.path}.")
        return int(found[1]) if found else 0

    @property
    def width(self) -> str:
        """Neurons of an expert, such as ``192`` or ``701-860``; "" without experts."""
        if not self.widths:
            return "1" if self.experts else ""
        low, high = min(self.widths), max(self.widths)
        return str(low) if low == high else f"{low}-{high}"

    @property
    def share(self) -> float:
        """Planned share of the neurons that a token uses."""
        return self.active / self.d_ff if self.converted else 1.0


@dataclass(frozen=True)
class Facts:
    """One converted folder.

    Attributes:
        name: Of the folder.
        config: Its config.json, with the block ``moesaic``.
        results: Its results.json; may be empty.
        layers: All FFNs in their order, those left dense among them. Empty where no blueprint holds any more.
        row_bytes: What a token reads of a dense neuron: its row of each matrix, in bf16 where the output is int8.
        parameters: As :mod:`moesaic.checkpoint.parameters` counts them.
        nbytes: Of its tensors on disk.
        dtype: Of most tensors.
        training: Lines of train.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    layers: tuple[Layer, ...] = ()
    row_bytes: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtype: str = ""
    training: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def made(self) -> Mapping[str, Any]:
        """config.json's block ``moesaic``."""
        return self.config["moesaic"]

    @property
    def base(self) -> str:
        """Name of the dense model."""
        return str(self.made.get("base_model") or "a dense model")

    @property
    def evaluations(self) -> dict[str, Any]:
        """Evaluations by protocol, those with most windows last."""
        found: dict[str, Any] = self.results.get("evaluation", {})
        return dict(sorted(found.items(), key=lambda each: _extent(each[1])))

    @property
    def sample(self) -> Mapping[str, Any]:
        """What the sample text showed; see :mod:`moesaic.evaluate.sample`."""
        return self.results.get("sample", {})

    @property
    def converted(self) -> tuple[Layer, ...]:
        """The FFNs that were converted."""
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def planned(self) -> float | None:
        """Share of the converted FFNs' neurons that a token uses, as planned."""
        neurons = sum(layer.d_ff for layer in self.converted)
        return sum(layer.active for layer in self.converted) / neurons if neurons else None

    def ffn_bytes(self, used: Mapping[str, float] | None = None) -> float:
        """What a token reads in all FFNs, routers included. ``used``: shares by path, in place of the planned ones."""
        shares = used or {}
        return sum(
            shares.get(layer.path, layer.share) * layer.d_ff * (layer.neuron_bytes or self.row_bytes)
            + layer.router_bytes
            for layer in self.layers
        )

    @property
    def dense_ffn_bytes(self) -> float:
        """The same of the dense model, at the same precision."""
        return float(sum(layer.d_ff for layer in self.layers) * self.row_bytes)

    @property
    def relative_bytes(self) -> float | None:
        """FFN bytes of a token over those of the dense model, by what the sample text used or as planned."""
        if not self.dense_ffn_bytes:
            return None
        used = {path: site["share"] for path, site in self.sample.get("sites", {}).items()}
        return self.ffn_bytes(used) / self.dense_ffn_bytes

    @property
    def varies(self) -> bool:
        """Whether the sample text used another share of some FFN than was planned."""
        sites = self.sample.get("sites", {})
        return any(abs(sites[each.path]["share"] - each.share) > 0.005 for each in self.layers if each.path in sites)

    def by_layer(self, values: Mapping[str, float]) -> list[tuple[float, float]]:
        """Means over the FFNs of each decoder layer, as points (layer, value); ``values`` by path."""
        found: dict[int, list[float]] = {}
        for layer in self.layers:
            if (value := values.get(layer.path)) is not None:
                found.setdefault(layer.index, []).append(value)
        return [(float(index), fmean(each)) for index, each in sorted(found.items())]

    def fidelity(self) -> Mapping[str, Any]:
        """Router fidelity of the last evaluation that has it; {} where none has."""
        found = [each["fidelity"] for each in self.evaluations.values() if each.get("fidelity")]
        return found[-1] if found else {}

    def speed(self) -> Mapping[str, Any]:
        """Speeds of the last evaluation that has both models'; {} where none has."""
        found = [each["speed"] for each in self.evaluations.values() if {DENSE, MODEL} <= set(each.get("speed") or {})]
        return found[-1] if found else {}

    def parameters_dense(self) -> int | None:
        """Of the dense model, where an evaluation has counted them."""
        found = [each["parameters_dense"] for each in self.evaluations.values() if each.get("parameters_dense")]
        return found[-1] if found else None


def protocol_words(protocol: str) -> str:
    """``ppl[wikitext2-raw/test w512 n=6]`` as words."""
    match = _PROTOCOL.fullmatch(protocol)
    if match is None:
        return protocol
    count = "all windows" if match["count"] == "all" else f"{match['count']} windows"
    dtype = f", {match['dtype']}" if match["dtype"] else ""
    return f"{match['text']}, {count} of {match['window']} tokens{dtype}"


def shared_protocols(models: Sequence[Facts]) -> list[str]:
    """Protocols under which each of the models was measured."""
    first, *others = models
    return [name for name in first.evaluations if all(name in other.evaluations for other in others)]


def quality_rows(facts: Facts) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Protocol, label and row of all perplexities."""
    for protocol, evaluation in facts.evaluations.items():
        for label, row in evaluation.get("perplexity", {}).items():
            yield protocol, label, row


def _extent(evaluation: Mapping[str, Any]) -> tuple[int, int]:
    """Windows and predicted tokens of an evaluation."""
    rows = list(evaluation.get("perplexity", {}).values()) or [{}]
    return max((len(row.get("window_nll") or ()), int(row.get("predicted") or 0)) for row in rows)
