"""Cost: what a token reads, what the model weighs, how fast it is where that was measured."""

from __future__ import annotations

from moesaic.report.facts import DENSE, MODEL, Facts
from moesaic.report.html import note, table


def mebibytes(count: float) -> str:
    """``12.3 MiB``."""
    return f"{count / 2**20:.1f} MiB"


def millions(count: float) -> str:
    """``134.5 M``."""
    return f"{count / 1e6:.1f} M"


def used_shares(facts: Facts) -> dict[str, float]:
    """Share of its neurons that each FFN used on the sample text."""
    return {path: site["share"] for path, site in facts.sample.get("sites", {}).items()}


def cost(facts: Facts) -> list[str]:
    """One table: the dense model beside this one."""
    rows: list[list[str]] = []

    def add(name: str, dense: float | None, own: float, show: str = "{:.1f}") -> None:
        ratio = "" if not dense else f"{own / dense:.3f}"
        rows.append([name, "" if dense is None else show.format(dense), show.format(own), ratio])

    if facts.dense_ffn_bytes:
        full = facts.dense_ffn_bytes / 2**20
        add("FFN weights that a token reads, as planned, MiB", full, facts.ffn_bytes() / 2**20)
        if facts.varies:
            add("the same, on the sample text, MiB", full, facts.ffn_bytes(used_shares(facts)) / 2**20)
        routers = sum(layer.router_bytes for layer in facts.layers)
        add("the routers' part of it, MiB", None, routers / 2**20)
    parameters = facts.parameters_dense()
    add("parameters, millions", None if parameters is None else parameters / 1e6, facts.parameters / 1e6)
    add("weights on disk, MiB", None, facts.nbytes / 2**20)
    for kind, name in (("prefill", "reading a prompt, tokens per second"), ("decode", "generating, tokens per second")):
        if speed := facts.speed():
            add(name, speed[DENSE][kind], speed[MODEL][kind])
    remark = "Bytes count the weights of the chosen neurons and the routers. Attention and embeddings are as before."
    if not facts.speed():
        remark += " Speed has not been measured: `moesaic eval OUT --baseline DENSE --speed` does it."
    return [table(["", "dense", "this model", "ratio"], rows), note(remark)]
