"""The model card (README.md) of an output folder: what it is, how to load it, what has been measured and how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.wrappers import whole_config
from moesaic.calibration.config import CalibrationConfig
from moesaic.checkpoint.converted import as_written, has_int8, has_neuron_experts
from moesaic.checkpoint.mark import KEY, pruned, tuned
from moesaic.checkpoint.origin import CARD, is_hub_id
from moesaic.durable import replace_text
from moesaic.evaluate.comparison import Comparison
from moesaic.jobs.report import PAGE_NAME, gather, write_report
from moesaic.report.page import page
from moesaic.staging.results import proven_alike, read_results

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from moesaic.staging.writer import StagedOutput

_FITTED_TO = {
    "oracle": "the experts that do most on calibration text",
    "decisions": "what the method's own routers choose",
}
_HUB_DATASETS = {"wikitext": "Salesforce/wikitext", "c4": "allenai/c4", "tiny": "roneneldan/TinyStories"}
_EVALUATION_TEXTS = {
    "wikitext2-raw/test": {
        "dataset_type": "Salesforce/wikitext",
        "dataset_name": "WikiText-2 raw",
        "dataset_config": "wikitext-2-raw-v1",
        "dataset_split": "test",
    }
}
_PROTOCOL_TEXT = re.compile(r"ppl\[(?P<text>.+) w\d+ n=\w+( \w+)?\]")


def model_card(config: Mapping[str, Any], results: Mapping[str, Any], *, hashed: bool = True) -> str:
    """The card as Markdown with the hub's metadata in front, as huggingface_hub writes them.

    The hub knows no relation "converted to a MoE"; ``finetune`` is the nearest of its four.

    Args:
        config: The output's config.json, with its ``moesaic`` block.
        results: Its results.json; may be empty.
        hashed: Whether manifest.json was written with the files.
    """
    made = config["moesaic"]
    parts = [
        _metadata(config, results),
        f"# {_title(made)}\n",
        _what(config, made),
        _loading(config),
        _proven(results),
        _measured(results),
        _how(made, hashed=hashed),
        _licence(made),
    ]
    return "\n".join(part for part in parts if part)


def finish(staged: StagedOutput, results: dict[str, Any], check: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Let an output appear once ``check`` has passed on the staged folder; what it found joins ``results``.

    Results, card and page are part of the output. Raises what ``check`` raises; the output does not appear then.
    """

    def verify(folder: Path) -> None:
        results.update(check(folder))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        staged.write_text(CARD, model_card(config, results))
        staged.write_text(PAGE_NAME, page(replace(gather(folder, results), name=staged.out.name)))

    return staged.finish(results=results, verify=verify)


def write_pages(folder: Path) -> None:
    """Write or renew the card and the page of an output folder from what it holds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    replace_text(folder / CARD, model_card(config, read_results(folder), hashed=as_written(folder)))
    write_report(folder)


def _metadata(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    made = config["moesaic"]
    base = str(made.get("base_model") or "")
    licence = made.get("license") or {}
    found = _eval_results(results)
    kind = [] if pruned(made) else ["moe"]
    relation: dict[str, Any] = {"base_model_relation": "finetune"} if is_hub_id(base) else {}
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        language=made.get("language") or None,
        license=licence.get("id"),
        license_name=licence.get("name"),
        license_link=licence.get("link"),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if whole_config(config) else "text-generation",
        tags=[*kind, "moesaic", made["method"], made.get("target") or config["model_type"]],
        datasets=_datasets(made),
        metrics=["perplexity"] if found else None,
        eval_results=found or None,
        model_name=_title(made) if found else None,
        **relation,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _datasets(made: Mapping[str, Any]) -> list[str] | None:
    """The calibration texts that are on the hub."""
    if not made.get("calibration"):
        return None
    sources = CalibrationConfig.model_validate(made["calibration"]).expanded()
    return [_HUB_DATASETS[source.name] for source in sources if source.name in _HUB_DATASETS] or None


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """This model's perplexity under each protocol, and its ratio to the dense model's; the protocol is in the name."""
    from huggingface_hub import EvalResult

    found = []
    for protocol, evaluation in results.get("evaluation", {}).items():
        row = evaluation["perplexity"].get("model")
        if row is None:
            continue
        match = _PROTOCOL_TEXT.fullmatch(protocol)
        text = match["text"] if match else protocol
        dataset = _EVALUATION_TEXTS.get(text, {"dataset_type": text, "dataset_name": text})
        metrics = [("perplexity", protocol, row["value"])]
        if ratio := row.get("ratio_to_dense"):
            metrics.append(("perplexity-ratio", f"{protocol}, ratio to the dense model", ratio["ratio"]))
        found += [
            EvalResult(
                "text-generation",
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
                **dataset,  # type: ignore[arg-type]
            )
            for kind, name, value in metrics
        ]
    return found


def _title(made: Mapping[str, Any]) -> str:
    layout = made["config"].get("layout")
    what = "pruned," if pruned(made) else "as a MoE,"
    return " ".join(str(part) for part in (made.get("base_model") or "model", what, made["method"], layout) if part)


def _what(config: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    specs = list(config.get("ffn_sites", {}).values())
    kind = "narrower dense" if pruned(made) else "Mixture-of-Experts"
    text = (
        f"A {kind} checkpoint made from a dense one after its training, by moesaic {made['version']} with the method "
        f"`{made['method']}`."
    )
    if specs:
        first = specs[0]
        width = "different widths" if first["experts"] and not first["expert_width"] else first["expert_width"]
        text += (
            f" {len(specs)} feed-forward networks were converted; the first has a shared expert of {first['shared']} "
            f"neurons and {first['experts']} experts of {width}, {first['top_k']} active per token "
            f"({first['router']} router)."
        )
        if has_int8(config):
            text += " Their weights were rounded to int8, of which the high half is the router."
    elif config["model_type"] != "moesaic":
        text += f" It is a {config['model_type']} model: engines that load this architecture need no code of moesaic."
    if whole := whole_config(config):
        text += (
            f" It is a {whole['model_type']} model with all its parts: its text model was converted, the others are "
            "unchanged."
        )
    elif inside := made.get("wrapper"):
        text += (
            f" It is the text model of a {inside['model_type']} checkpoint and reads only text. Left out are the other "
            f"parts: {', '.join(f'`{part}`' for part in inside['left_out']) or 'none was there'}."
        )
    if router := made.get("router"):
        text += f" Its routers are linear ones, fitted to {_FITTED_TO[router['mode']]}."
    if training := made.get(KEY):
        text += (
            f" Afterwards it was trained for {training['steps']} steps on {training['tokens']} tokens "
            f"({', '.join(training['trained'])}): its weights are no longer those of the dense model."
        )
    elif tuned(config):
        text += " Afterwards transformers saved it: its weights need not be those of the dense model."
    return text + "\n"


def _loading(config: Mapping[str, Any]) -> str:
    native = config["model_type"] != "moesaic"
    auto = "AutoModelForImageTextToText" if whole_config(config) else "AutoModelForCausalLM"
    load = f"{auto}.from_pretrained(folder" + (")" if native else ", trust_remote_code=True)")
    remark = "" if native else "\n`moesaic.register()` before loading makes `trust_remote_code` unnecessary.\n"
    if has_neuron_experts(config):
        remark += (
            "\nPrompts are computed by the dense FFNs, and only generated tokens by the chosen neurons. "
            "`exact_prefill=False` masks all tokens, as every figure here is measured.\n"
        )
    return f"```python\nfrom transformers import {auto}\nmodel = {load}\n```\n{remark}"


def _proven(results: Mapping[str, Any]) -> str:
    """What was compared when the folder was written."""
    lines = []
    if alike := proven_alike(results.get("parity")):
        lines.append(alike)
    if native := results.get("native_parity"):
        lines.append(
            f"In stock transformers its logits are what the conversion asks for, on {native['tokens']} tokens: median "
            f"difference {native['median']:.1e} (relative), same next token {native['top1']:.2%}, mean KL "
            f"{native['mean_kl']:.1e}."
        )
    elif reason := results.get("native_parity_skipped"):
        lines.append(
            f"Its tensors are those that the conversion asks for. Its logits have not been checked in stock "
            f"transformers: {reason}. `moesaic verify --parity` does."
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
            interval = Comparison(**ratio).shown() if ratio else ""
            rows.append(f"| {name} | {label} | {row['value']:.3f} | {interval} |")
    if not rows:
        return "Nothing has been measured yet: `moesaic eval FOLDER --baseline DENSE --controls` fills this in.\n"
    head = "| protocol | model | perplexity | ratio to dense [95 %] |\n|---|---|---|---|\n"
    return "## Measured\n\n" + head + "\n".join(rows) + "\n"


def _how(made: Mapping[str, Any], *, hashed: bool) -> str:
    recipe = {"method": made["method"], "options": made["config"], "calibration": _shown_calibration(made)}
    if made.get("router"):
        recipe["router"] = made["router"]
    if training := made.get(KEY):
        shown = ("preset", "steps", "tokens", "trained", "losses")
        recipe[KEY] = {key: training[key] for key in shown if key in training}
    return (
        "## How it was made\n\n"
        f"```json\n{json.dumps(recipe, indent=1)}\n```\n\n"
        f"Source model sha256 `{made['source'][:16]}`, blueprint `{made['blueprint'][:16]}`"
        + ("; `manifest.json` has the hash of every file.\n" if hashed else ".\n")
    )


def _shown_calibration(made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration settings; of the user's own files only the names, not where they lie."""
    calibration = made.get("calibration")
    if not calibration:
        return None
    sources = [{**source, "name": Path(source["name"]).name} for source in calibration["sources"]]
    return {**calibration, "sources": sources}


def _licence(made: Mapping[str, Any]) -> str:
    base = made.get("base_model") or "the source model"
    if not (licence := made.get("license")):
        return (
            f"## Licence\n\nThe files of {base} did not say under which licence its weights are. It holds for these as "
            "well: look it up before you pass them on.\n"
        )
    name, link = licence.get("name") or licence["id"], licence.get("link")
    terms = f"[{name}]({link})" if link else name
    return f"## Licence\n\nThe weights come from {base}, and its licence holds for them: {terms}.\n"
