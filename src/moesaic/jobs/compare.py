"""Several outputs beside each other: their facts, and the ratios of their perplexities where they read one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.durable import replace_text
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.perplexity import Perplexity
from moesaic.jobs.report import gather
from moesaic.report.compare import comparison, names_of
from moesaic.report.facts import MODEL, Facts
from moesaic.staging.manifest import hash_file


@dataclass(frozen=True)
class Compared:
    """The facts of each output, and perplexities over the first one's: protocol -> name -> ratio, low, high."""

    models: tuple[Facts, ...]
    paired: dict[str, dict[str, dict[str, float | None]]]


def compare_outputs(folders: Sequence[str | Path], page: str | Path | None = None) -> Compared:
    """Gather what is known of several outputs; with ``page``, also write the page that compares them there.

    Raises:
        InputError: a folder is no output of moesaic.
        CheckpointError, VerificationError: a folder is damaged.
    """
    models = tuple(gather(Path(folder).expanduser()) for folder in folders)
    compared = Compared(models, _paired(models, [_reads(Path(folder).expanduser()) for folder in folders]))
    if page is not None:
        replace_text(Path(page).expanduser(), comparison(models, compared.paired))
    return compared


def _paired(models: Sequence[Facts], tokens: Sequence[str]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Paired over windows, as the ratio to the dense model is; a model that read other windows is left out.

    ``tokens``: by what each model reads a text.
    """
    first, *others = zip(names_of(models), models, tokens, strict=True)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for protocol in first[1].evaluations:
        base = _perplexity(first[1], protocol)
        for name, facts, reads in others:
            own = _perplexity(facts, protocol)
            if base and own and reads == first[2] and len(base.window_nll) == len(own.window_nll):
                found.setdefault(protocol, {})[name] = compare(own, base).to_dict()
    return found


def _reads(folder: Path) -> str:
    """A digest of the folder's tokenizer; "" where it has none."""
    files = (folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return next((hash_file(file) for file in files if file.is_file()), "")


def _perplexity(facts: Facts, protocol: str) -> Perplexity | None:
    row: dict[str, Any] | None = facts.evaluations.get(protocol, {}).get("perplexity", {}).get(MODEL)
    if not row or not row.get("window_nll"):
        return None
    return Perplexity(row["name"], row["value"], row["predicted"], tuple(row["window_nll"]))
