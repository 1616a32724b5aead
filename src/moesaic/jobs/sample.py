"""A short text through a converted model, for its page: kept in results.json.

Axes: T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy, max_positions
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.documents import read_text
from moesaic.checkpoint.converted import WEIGHTS_KEY, as_written, current_results, read_blueprint, read_dense_anatomy
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.durable import replace_text
from moesaic.errors import InputError
from moesaic.evaluate.sample import read_sample, token_losses
from moesaic.materialise.apply import apply_blueprint
from moesaic.nn.ffn import FFNWeights
from moesaic.progress import Progress
from moesaic.staging.results import RESULTS_NAME, merged
from moesaic.targets import OWN

SAMPLE_KEY = "sample"
_PARITIES = ("parity", "native_parity", "native_parity_skipped", "vllm_parity")
OF_ONE_FOLDER = frozenset({"evaluation", *_PARITIES, "tune", "export", SAMPLE_KEY, WEIGHTS_KEY})
"""Results that hold for the folder that was measured, and not for what is made from it."""
"""In results.json."""
_TOKENS = 192
"""Most tokens of a sample: more are not read by eye."""


def sample_of_model(checkpoint: Checkpoint, blueprint: Blueprint, model: Any) -> dict[str, Any]:
    """What the shipped text shows of a loaded model of the ``moesaic`` architecture; {} of another."""
    if checkpoint.config.get("model_type") != OWN:
        return {}
    pieces, ids_T = _tokens(checkpoint, None)
    losses, sites = read_sample(model, ids_T, blueprint.sites)
    return {"tokens": pieces, "nll": losses, "sites": {path: site.to_dict() for path, site in sites.items()}}


def save_sample(folder: Path, found: Mapping[str, Any]) -> None:
    """Keep what a sample showed in results.json."""
    checkpoint = Checkpoint(folder)
    results = {key: value for key, value in current_results(checkpoint).items() if key != SAMPLE_KEY}
    results = merged(results, {SAMPLE_KEY: dict(found)})
    if not as_written(folder):
        results[WEIGHTS_KEY] = checkpoint.fingerprint()
    replace_text(folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")


def read_output(folder: Path, dense: Checkpoint | None, text: str | Path | None, progress: Progress) -> dict[str, Any]:
    """The sample's figures, for results.json; {} where the model's experts cannot be seen.

    ``dense``: adds errors and the dense model's losses. ``text``: in place of the one that ships."""
    checkpoint = Checkpoint(folder)
    blueprint = read_blueprint(checkpoint, hashed=False)
    own = checkpoint.config.get("model_type") == OWN
    if blueprint is None or (not own and (dense is None or tuned(checkpoint.config))):
        progress.note(
            "no tokens are shown: the experts of a stock architecture are read through its dense model and blueprint "
            "(--baseline MODEL)"
        )
        return {}
    pieces, ids_T = _tokens(checkpoint, text)
    progress.note(f"reading a sample of {len(ids_T)} tokens")
    anatomy = _anatomy(checkpoint, dense)
    made: dict[str, Any] = {"tokens": pieces}
    weights = None if dense is None or tuned(checkpoint.config) else _dense_ffns(dense, anatomy)
    if dense is not None:
        made["nll_dense"] = token_losses(load_model(dense.folder, "auto"), ids_T)
    model = load_model(folder, "auto") if own else _rebuilt(dense, blueprint, anatomy)
    made["nll"], sites = read_sample(model, ids_T, blueprint.sites, weights)
    return made | {"sites": {path: site.to_dict() for path, site in sites.items()}}


def _tokens(checkpoint: Checkpoint, text: str | Path | None) -> tuple[list[str], Tensor]:
    """The first tokens of a text: what each says, and ids_T."""
    tokenizer: Any = load_tokenizer(checkpoint.folder)
    longest = min(_TOKENS, max_positions(checkpoint.config.get("text_config", checkpoint.config)) or _TOKENS)
    encoded = tokenizer(_text(text), add_special_tokens=False, return_tensors="pt", verbose=False)
    ids_T = encoded["input_ids"][0][:longest]
    if len(ids_T) < 2:
        raise InputError(f"the sample has {len(ids_T)} tokens, two are needed", "give a longer text")
    return _pieces(tokenizer, ids_T.tolist()), ids_T


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; together they are the text. A token that ends within a character has none of its own."""
    pieces, known = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        whole = text.rstrip("\ufffd")
        pieces.append(whole[len(known) :])
        known = whole if len(whole) > len(known) else known
    return pieces


def _anatomy(checkpoint: Checkpoint, dense: Checkpoint | None) -> Anatomy:
    if dense is None:
        return read_dense_anatomy(checkpoint)
    return read_anatomy(dense.config, hierarchical=FAMILIES[dense.config["model_type"]].moe is not None)


def _dense_ffns(dense: Checkpoint, anatomy: Anatomy) -> Callable[[str], FFNWeights]:
    sites = {site.path: site for site in anatomy.sites}
    return lambda path: load_ffn(dense, sites[path], anatomy.activation)


def _rebuilt(dense: Checkpoint | None, blueprint: Blueprint, anatomy: Anatomy) -> Any:
    """The converted model in our runtime, from the dense one and the blueprint of a stock folder."""
    assert dense is not None
    model = load_model(dense.folder, "auto")
    apply_blueprint(model, blueprint, anatomy, dense)
    return model.eval()


def _text(path: str | Path | None) -> str:
    if path is None:
        return files("moesaic").joinpath("data", "sample.txt").read_text(encoding="utf-8")
    try:
        return read_text(Path(path).expanduser())
    except OSError as error:
        raise InputError(f"sample {path} cannot be read: {error.strerror}", "give a UTF-8 text file") from error
