"""The page of one output: what it is, what it lost, what it costs, layer by layer, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePath

from moesaic.checkpoint.mark import pruned
from moesaic.report.cost import cost, mebibytes
from moesaic.report.facts import DENSE, MODEL, Facts, protocol_words
from moesaic.report.html import definitions, escape, note, section, tile
from moesaic.report.layers import layers
from moesaic.report.quality import Mark, quality
from moesaic.report.svg import percent
from moesaic.report.tokens import tokens
from moesaic.report.training import training
from moesaic.staging.results import proven_alike

TIMES = "\N{MULTIPLICATION SIGN}"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses to load anything from elsewhere."""


def document(title: str, lead: str, tiles: Sequence[str], sections: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """A whole page.

    Args:
        title, lead: Its heading and the sentence below.
        tiles: Figures that lead; HTML.
        sections: Name, heading and parts of each; those without parts are left out.
    """
    made = [(name, heading, section(name, heading, *parts)) for name, heading, parts in sections]
    kept = [(name, heading, html) for name, heading, html in made if html]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in kept)
    style, script = (files("moesaic.report").joinpath(name).read_text(encoding="utf-8") for name in _PARTS)
    first, _, rest = title.partition(" as ")
    heading = f"{escape(first)} <span>as {escape(rest)}</span>" if rest else escape(first)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n<style>{style}</style></head>\n<body><main>'
        f'<header><h1>{heading}</h1><p class="lead">{escape(lead)}</p><nav>{links}</nav></header>'
        + (f'<div class="tiles">{"".join(tiles)}</div>\n' if tiles else "")
        + "\n".join(html for _, _, html in kept)
        + "\n"
        "<footer>Made by moesaic. This file needs no network and no other file.</footer></main>\n"
        f"<script>{script}</script></body></html>\n"
    )


_PARTS = ("page.css", "tokens.js")


def page(facts: Facts) -> str:
    """The page of one output."""
    return document(
        title_of(facts),
        _lead(facts),
        _tiles(facts),
        [
            ("quality", "Quality", quality(facts)),
            ("cost", "Cost", cost(facts)),
            ("layers", "Layer by layer", layers(facts)),
            ("tokens", "Which tokens use which experts", tokens(facts)),
            ("training", "Training", training(facts)),
            ("made", "What was made, and how", _made(facts)),
        ],
    )


def title_of(facts: Facts) -> str:
    """Such as ``SmolLM2-135M as cmoe S3A3E8``, or ``as token clusters at 50 %``."""
    config = facts.made.get("config", {})
    size = config.get("layout") or (f"at {percent(config['active'])}" if config.get("active") else "")
    return " ".join(part for part in (facts.base, "as", facts.made["method"].replace("_", " "), size) if part)


def _lead(facts: Facts) -> str:
    converted, dense = len(facts.converted), len(facts.layers) - len(facts.converted)
    text = f"Folder {facts.name}."
    if converted:
        became = "narrower" if pruned(facts.made) else "mixtures of experts"
        text += f" {converted} feed-forward networks became {became}"
        text += f", {dense} stayed dense." if dense else "."
    if training := facts.made.get("tuned"):
        text += f" Then it was trained on {training['tokens']:,} tokens."
    return text


def _tiles(facts: Facts) -> list[str]:
    made = []
    best = [(name, each) for name, each in facts.evaluations.items() if MODEL in each.get("perplexity", {})]
    if best:
        protocol, evaluation = best[-1]
        row = evaluation["perplexity"][MODEL]
        if ratio := row.get("ratio_to_dense"):
            mark = Mark.of("", ratio, "")
            made.append(tile(f"{mark.ratio:.3f}{TIMES}", "the dense model's perplexity", mark.shown.partition(" ")[2]))
        else:
            made.append(tile(f"{row['value']:.2f}", "perplexity", protocol_words(protocol)))
    if facts.planned is not None:
        used = [each["active_ffn_fraction"] for _, each in best if "active_ffn_fraction" in each]
        shown = percent(round(used[-1] if used else facts.planned, 3))
        remark = f"{percent(round(facts.planned, 3))} planned" if used else "planned"
        made.append(tile(shown, "of the neurons per token", remark))
    if (bytes_ := facts.relative_bytes) is not None:
        read = facts.dense_ffn_bytes * bytes_
        made.append(
            tile(
                f"{bytes_:.2f}{TIMES}",
                "FFN bytes per token",
                f"{mebibytes(read)}, routers included" + (", on the sample" if facts.varies else ""),
            )
        )
    if speed := facts.speed():
        made.append(
            tile(
                f"{speed[MODEL]['decode'] / speed[DENSE]['decode']:.2f}{TIMES}",
                "generating speed",
                "on the machine that measured",
            )
        )
    parameters = facts.parameters_dense()
    remark = f"dense {parameters / 1e6:.1f} M" if parameters else ""
    made.append(tile(f"{facts.parameters / 1e6:.1f} M", "parameters", remark))
    return made


def _made(facts: Facts) -> list[str]:
    made = facts.made
    licence = made.get("license") or {}
    rows = [
        ("Dense model", facts.base),
        ("Licence", str(licence.get("name") or licence.get("id") or "not said by the dense model's files")),
        ("Method", str(made["method"])),
        ("Architecture", str(made.get("target") or facts.config.get("model_type"))),
        ("Stored as", f"{facts.dtype}, {mebibytes(facts.nbytes)}"),
        ("Calibration", _calibration(facts)),
        ("moesaic", str(made.get("version", ""))),
        ("Source sha256", str(made.get("source", ""))[:16]),
        ("Blueprint", str(made.get("blueprint", ""))[:16]),
    ]
    recipe = {key: made[key] for key in ("config", "router", "target_options", "tuned") if made.get(key)}
    checked = _checked(facts)
    return [
        definitions(rows),
        f"<h3>Checked when it was written</h3><ul>{checked}</ul>" if checked else "",
        f"<details><summary>All options</summary><pre>{escape(json.dumps(recipe, indent=1))}</pre></details>",
    ]


def _calibration(facts: Facts) -> str:
    made = facts.made.get("calibration")
    if not made:
        return "none"
    names = [PurePath(str(source["name"])).name for source in made.get("sources", ())]
    return f"{made.get('tokens', 0):,} tokens of {', '.join(names) or 'text'}"


def _checked(facts: Facts) -> str:
    results, lines = facts.results, []
    if alike := proven_alike(results.get("parity")):
        lines.append(alike)
    if native := results.get("native_parity"):
        lines.append(f"Stock transformers computes what was decided: same next token {native['top1']:.2%}.")
    if reason := results.get("native_parity_skipped"):
        lines.append(f"Not checked in stock transformers: {reason}.")
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


__all__ = ["document", "note", "page", "title_of"]
