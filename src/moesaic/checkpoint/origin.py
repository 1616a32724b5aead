"""Where a checkpoint comes from, as far as its folder says: hub id, licence, languages. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")
_FOLDER_WORDS = frozenset({"ckpt", "checkpoints", "data", "home", "model", "models", "out", "output", "outputs", "tmp"})
_LICENCE_TEXTS = (  # what a licence file says -> the hub's identifier
    (("Apache License", "Version 2.0"), "apache-2.0"),
    (("Permission is hereby granted, free of charge", "WITHOUT WARRANTY OF ANY KIND"), "mit"),
)
_FROM_GGUF = ", dequantised from a GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_GGUF_SOURCES = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's cards name it: an identifier, and for ``other`` its name and where its text is."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """What is known of the source of the weights.

    Attributes:
        base_model: Its id on the hub, else a name; never a path of this machine.
        licence: None where nothing in the folder says it.
        languages: Of its card; empty where it has none.
    """

    base_model: str
    licence: Licence | None = None
    languages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "base_model": self.base_model,
            "license": None if self.licence is None else {k: v for k, v in asdict(self.licence).items() if v},
            "language": list(self.languages),
        }


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as ``owner/model``; what looks like a folder does not."""
    return bool(_HUB_ID.fullmatch(name)) and name.partition("/")[0].lower() not in _FOLDER_WORDS


def read_origin(folder: Path, config: Mapping[str, Any]) -> Origin:
    """The origin of the checkpoint in ``folder``, from its place in the hub's cache, its config, card and licence."""
    card = _front_matter(folder / CARD)
    return Origin(_base_model(folder, config, card), _licence(folder, config, card), _texts(card.get("language")))


def write_gguf_card(fields: Mapping[str, Any], folder: Path, file: Path) -> None:
    """Keep what a GGUF's metadata say of its origin as the card of the folder that it was dequantised into.

    Args:
        fields: The file's metadata by key, such as ``general.license``.
        folder: The dequantised checkpoint.
        file: The GGUF, by which the model is called where the metadata give it no name.
    """
    import yaml

    sources = (_HUB_URL.sub(r"\1", str(fields[key])) for key in _GGUF_SOURCES if fields.get(key))
    source = next((name for name in sources if is_hub_id(name)), None)
    about = {
        "license": fields.get("general.license"),
        "license_name": fields.get("general.license.name"),
        "license_link": fields.get("general.license.link"),
        "language": list(_texts(fields.get("general.languages"))),
        "base_model": source,
        "base_model_relation": "quantized" if source else None,
    }
    text = yaml.safe_dump({key: value for key, value in about.items() if value}, sort_keys=False)
    named = " ".join(str(fields.get("general.name") or "").split())
    title = named if _is_title(named) else _PART.sub("", file.stem)
    (folder / CARD).write_text(f"---\n{text}---\n\n# {title}{_FROM_GGUF}\n", encoding="utf-8")


def _is_title(name: str) -> bool:
    """Whether a name is neither empty nor a path of somebody's machine, which some converters take for it."""
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\"}


def _gguf_title(card: Path) -> str:
    """What :func:`write_gguf_card` calls the model; "" where the card is another."""
    try:
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    titles = (
        line[2:].removesuffix(_FROM_GGUF) for line in lines if line.startswith("# ") and line.endswith(_FROM_GGUF)
    )
    return next(filter(_is_title, titles), "")


def _front_matter(card: Path) -> dict[str, Any]:
    """The card's metadata; {} where there are none that can be read."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a source's card is not worth failing for
        return {}


def _base_model(folder: Path, config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    place = folder.absolute()
    cached = _HUB_CACHE.fullmatch(place.parent.parent.name) if place.parent.name == "snapshots" else None
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if card.get("base_model_relation") == "quantized":  # as good as that model itself
        parents = _texts(card.get("base_model"))
        if len(parents) == 1 and is_hub_id(parents[0]):
            return parents[0]
    name = str(config.get("_name_or_path") or "")
    if is_hub_id(name) and not Path(name).exists():
        return name
    return _gguf_title(folder / CARD) or folder.resolve().name  # in the cache a GGUF's folder has a hash in its name


def _licence(folder: Path, config: Mapping[str, Any], card: Mapping[str, Any]) -> Licence | None:
    named = _texts(card.get("license") or config.get("license"))
    if named:
        name, link = card.get("license_name"), card.get("license_link")
        return Licence(named[0], str(name) if name else None, str(link) if link else None)
    for path in sorted(folder.glob("LICEN[CS]E*")):
        if path.is_file():
            return _licence_of_text(path)
    return None


def _licence_of_text(path: Path) -> Licence:
    text = path.read_text(encoding="utf-8", errors="replace")
    for marks, identifier in _LICENCE_TEXTS:
        if all(mark.lower() in text.lower() for mark in marks):
            return Licence(identifier)
    title = next((line for line in text.splitlines() if line.strip()), path.name)
    slug = "-".join(re.findall(r"[a-z0-9.]+", title.lower()))[:60]
    return Licence("other", slug or "see-its-text", path.name)


def _texts(value: Any) -> tuple[str, ...]:
    """A field that is one text or a list of texts."""
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return tuple(entry for entry in values if isinstance(entry, str) and entry)
