"""What to calibrate on, as data: text sources with weights, number of tokens, window, precision. No torch here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moesaic.calibration.samples import MIX, SAMPLES
from moesaic.errors import InputError
from moesaic.options.device import native_bfloat16

if TYPE_CHECKING:
    import torch

MIX_NAME = "mix"
RECORD_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""Suffixes of files that hold records, of which one field is the text."""
COMPRESSED = (".gz", ".bz2", ".xz")
"""Suffixes behind those, and behind those of text files, that are unpacked."""

_FLAGS = {"sources": "--calib", "tokens": "--calib-tokens", "window": "--calib-window"}
_WEIGHT = re.compile(r"(?P<rest>.+)=(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")
_ANY_RECORDS, _ANY_PACKED = ("|".join(map(re.escape, suffixes)) for suffixes in (RECORD_SUFFIXES, COMPRESSED))
_FIELD = re.compile(rf"(?P<path>.+({_ANY_RECORDS})({_ANY_PACKED})?):(?P<field>[^:/\\]+)", re.IGNORECASE)


class Source(BaseModel):
    """One text to calibrate on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        min_length=1,
        description="A built-in sample (wikitext, c4, code, wiki, tiny), `mix`, or the path of a text file, a folder "
        "of text files, or a file of records (.jsonl, .json, .csv, .tsv, .parquet; also .gz, .bz2, .xz of them). A "
        "built-in name wins; write ./code for a folder of that name.",
    )
    weight: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="Share of the windows that come from this source, relative to the others.",
    )
    field: str | None = Field(
        default=None,
        description="Field of the records that holds the text, or chat messages, which go through the model's chat "
        "template. If left out, the first of `text`, `messages`, `conversations` that a record has.",
    )

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: float) -> float:
        if weight <= 0:
            raise InputError(
                f"calibration weight {weight:g} is not positive", "leave out a source that is not to count"
            )
        return weight

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read the command line's form ``NAME[:FIELD][=WEIGHT]``: ``c4``, ``docs/``, ``corpus.parquet:content=2.0``.

        Where the whole text, or what stands before the weight, is a path that exists, it is that path:
        ``run/text=2024`` may be a file.

        Raises InputError for an empty name or a weight that is not positive.
        """
        rest, weight, field = text.strip(), 1.0, None
        if not _exists(rest) and (match := _WEIGHT.fullmatch(rest)):
            rest, weight = match["rest"], float(match["weight"])
        if not _exists(rest) and (match := _FIELD.fullmatch(rest)):
            rest, field = match["path"], match["field"]
        if not rest:
            raise InputError("an empty calibration source", f"give a path, {MIX_NAME} or one of {', '.join(SAMPLES)}")
        return cls(name=rest, weight=weight, field=field)

    @property
    def builtin(self) -> bool:
        """Whether the name is one of the shipped samples."""
        return self.name in SAMPLES

    @property
    def label(self) -> str:
        """The source as the user wrote it, without the weight."""
        return self.name if self.field is None else f"{self.name}:{self.field}"

    @property
    def kind(self) -> str:
        """How it is read: ``builtin``, ``text``, or a value of ``RECORD_SUFFIXES``."""
        if self.builtin:
            return "builtin"
        path = Path(self.name)
        path = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
        return RECORD_SUFFIXES.get(path.suffix.lower(), "text")


class CalibrationConfig(BaseModel):
    """The calibration text and how it is cut into token windows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[Source, ...] = Field(
        default=(Source(name=MIX_NAME),),
        description="Texts, mixed by weight: `mix` (wikitext 2, c4 1, code 1), `wikitext` (as in the papers), `c4`, "
        "`code`, `wiki`, `tiny`, or paths such as docs/, chats.jsonl, data.csv:body, corpus.parquet:content=2.0.",
    )
    tokens: int = Field(default=16384, gt=0, description="Calibration tokens in all (T), rounded up to whole windows.")
    window: int = Field(
        default=2048,
        gt=1,
        description="Tokens per window; clipped to `tokens` and to the longest context of the model.",
    )
    seed: int = Field(default=0, description="Decides where in the text the windows lie and their order.")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision in which the model runs during calibration; `auto` is bfloat16 on a CPU or GPU that "
        "multiplies it natively, else float32.",
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, str) else value
        if isinstance(entries, list | tuple):
            return tuple(Source.parse(entry) if isinstance(entry, str) else entry for entry in entries)
        return entries

    @field_validator("sources")
    @classmethod
    def _some_sources(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        if not sources:
            raise InputError("no calibration source", f"give a path, {MIX_NAME} or one of {', '.join(SAMPLES)}")
        return sources

    def windows(self, longest: int | None) -> int:
        """Number of windows for a model that reads at most ``longest`` tokens."""
        return math.ceil(self.tokens / min(self.window, self.tokens, longest or self.window))

    @property
    def names_sources(self) -> bool:
        """Whether somebody chose the texts, or they are the default."""
        return "sources" in self.model_fields_set

    def no_effect(self, why: str) -> tuple[str, ...]:
        """A note where somebody chose a text, or how much of it, that is not read; else nothing."""
        given = [flag for name, flag in _FLAGS.items() if name in self.model_fields_set]
        have = "has" if len(given) == 1 else "have"
        return (f"{why}: {' and '.join(given)} {have} no effect",) if given else ()

    def expanded(self) -> tuple[Source, ...]:
        """The sources with ``mix`` replaced by its parts and repeated ones added up, in order of first mention."""
        weights: dict[tuple[str, str | None], float] = {}
        for source in self.sources:
            parts = MIX if source.name == MIX_NAME else {source.name: 1.0}
            for name, share in parts.items():
                share = share / sum(parts.values()) * source.weight
                weights[name, source.field] = weights.get((name, source.field), 0.0) + share
        return tuple(Source(name=name, field=field, weight=weight) for (name, field), weight in weights.items())

    def resolved_dtype(self, device: torch.device | None = None) -> torch.dtype:
        """The dtype that ``compute_dtype`` means on a device; None is the CPU."""
        import torch

        if self.compute_dtype != "auto":
            return getattr(torch, self.compute_dtype)
        return torch.bfloat16 if native_bfloat16(device or torch.device("cpu")) else torch.float32


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, "~nobody", a zero byte: no path
        return False


def check_sources(calibration: CalibrationConfig) -> None:
    """Refuse calibration texts that are not there; what is in them is seen when they are read.

    Raises:
        InputError: naming the first source that does not exist.
    """
    for source in calibration.expanded():
        if not source.builtin and not Path(source.name).expanduser().exists():
            raise InputError(
                f"calibration source {source.name!r} does not exist",
                f"give a path, {MIX_NAME} or one of {', '.join(SAMPLES)}",
            )
