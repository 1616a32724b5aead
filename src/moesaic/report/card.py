"""The model card (README.md) of an output folder: what it is, how to load it, what has been measured and how."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
_FITTED_TO = {
    "oracle": "the experts that do most on calibration text",
    "decisions": "what the method's own routers choose",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The card as Markdown with the hub's metadata in front.

    Args:
        config: The output's config.json, with its ``moesaic`` block.
        results: Its results.json; may be empty.
    """
    made = config["moesaic"]
    parts = [
        _metadata(config),
        f"# {_title(made)}\n",
        _what(config, made),
        _loading(config),
        _proven(results),
        _measured(results),
        _how(made),
    ]
    return "\n".join(part for part in parts if part)


def write_card(folder: Path) -> None:
    """Write or renew the card of an output folder from its config.json and results.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    (folder / CARD).write_text(model_card(config, results), encoding="utf-8")


def _metadata(config: Mapping[str, Any]) -> str:
    base = str(config["moesaic"].get("base_model") or "")
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, moesaic]"]
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {base}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _title(made: Mapping[str, Any]) -> str:
    layout = made["config"].get("layout")
    return " ".join(
        str(part) for part in (made.get("base_model") or "model", "as a MoE,", made["method"], layout) if part
    )


def _what(config: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    specs = list(config.get("ffn_sites", {}).values())
    text = (
        f"A Mixture-of-Experts checkpoint made from a dense one after its training, by moesaic {made['version']} with "
        f"the method `{made['method']}`."
    )
    if specs:
        first = specs[0]
        text += (
            f" {len(specs)} feed-forward networks were converted; the first has a shared expert of {first['shared']} "
            f"neurons and {first['experts']} experts of {first['expert_width']}, {first['top_k']} active per token "
            f"({first['router']} router)."
        )
    elif config["model_type"] != "moesaic":
        text += f" It is a {config['model_type']} model: engines that load this architecture need no code of moesaic."
    if router := made.get("router"):
        text += f" Its routers are linear ones, fitted to {_FITTED_TO[router['mode']]}."
    return text + "\n"


def _loading(config: Mapping[str, Any]) -> str:
    native = config["model_type"] != "moesaic"
    load = "AutoModelForCausalLM.from_pretrained(folder" + (")" if native else ", trust_remote_code=True)")
    remark = "" if native else "\n`import moesaic` before loading makes `trust_remote_code` unnecessary.\n"
    return f"```python\nfrom transformers import AutoModelForCausalLM\nmodel = {load}\n```\n{remark}"


def _proven(results: Mapping[str, Any]) -> str:
    """What was compared when the folder was written."""
    lines = []
    if (parity := results.get("parity")) and parity["all_on"] is not None:
        lines.append(f"With all experts on, its logits are the dense model's to {parity['all_on']:.1e} (relative).")
    if native := results.get("native_parity"):
        lines.append(
            f"In stock transformers its logits are what the conversion asks for, on {native['tokens']} tokens: median "
            f"difference {native['median']:.1e} (relative), same next token {native['top1']:.2%}, mean KL "
            f"{native['mean_kl']:.1e}."
        )
    elif reason := results.get("native_parity_skipped"):
        lines.append(
            f"Its logits have not been checked in stock transformers: {reason}. `moesaic verify --parity` does."
        )
    if fit := results.get("router_fit"):
        mean = fit["mean"]
        lines.append(
            f"Fitted routers, on held-out calibration tokens: {mean['agreement_oracle']:.1%} of the experts that do "
            f"most are chosen (at random {mean['energy_random']:.1%}), {mean['energy']:.1%} of the experts' output "
            f"energy is kept (own routers {mean['energy_original']:.1%}, oracle {mean['energy_oracle']:.1%})."
        )
    return "## Checked\n\n" + "\n".join(f"* {line}" for line in lines) + "\n" if lines else ""


def _measured(results: Mapping[str, Any]) -> str:
    rows = []
    for name, evaluation in results.get("evaluation", {}).items():
        for label, row in evaluation["perplexity"].items():
            ratio = row.get("ratio_to_dense")
            interval = f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
            rows.append(f"| {name} | {label} | {row['value']:.3f} | {interval} |")
    if not rows:
        return "Nothing has been measured yet: `moesaic eval FOLDER --baseline DENSE --controls` fills this in.\n"
    head = "| protocol | model | perplexity | ratio to dense [95 %] |\n|---|---|---|---|\n"
    return "## Measured\n\n" + head + "\n".join(rows) + "\n"


def _how(made: Mapping[str, Any]) -> str:
    recipe = {"method": made["method"], "options": made["config"], "calibration": made.get("calibration")}
    if made.get("router"):
        recipe["router"] = made["router"]
    return (
        "## How it was made\n\n"
        f"```json\n{json.dumps(recipe, indent=1)}\n```\n\n"
        f"Source model sha256 `{made['source'][:16]}`, blueprint `{made['blueprint'][:16]}`; "
        "`manifest.json` has the hash of every file.\n"
    )
