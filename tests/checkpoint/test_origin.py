"""What a source's folder says of where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.checkpoint.origin import Licence, read_origin, write_gguf_card

CARD = "---\nlicense: {}\nlanguage: {}\n---\n# Model\n"
MIT = (
    "MIT License\n\nPermission is hereby granted, free of charge, ...\nTHE SOFTWARE ... WITHOUT WARRANTY OF ANY KIND\n"
)
APACHE = "\n                Apache License\n          Version 2.0, January 2004\n"


def test_nothing_known_leaves_the_folders_name(tmp_path: Path) -> None:
    origin = read_origin(tmp_path, {})
    assert (origin.base_model, origin.licence, origin.languages) == (tmp_path.name, None, ())
    assert origin.to_dict() == {"base_model": tmp_path.name, "license": None, "language": []}


def test_the_hubs_cache_tells_the_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--small-1b--chat" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert read_origin(snapshot, {"_name_or_path": "other/name"}).base_model == "acme/small-1b--chat"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("acme/small-1b", True),
        ("/home/me/small", False),
        ("./small", False),
        ("../acme/small", False),
        ("checkpoints/small", False),
        ("acme/small/extra", False),
        ("C:/small", False),
        ("", False),
    ],
)
def test_only_ids_of_the_hub_are_taken_from_the_config(name: str, known: bool, tmp_path: Path) -> None:
    assert read_origin(tmp_path, {"_name_or_path": name}).base_model == (name if known else tmp_path.name)


def test_a_folder_that_is_there_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read_origin(tmp_path / "acme", {"_name_or_path": "acme/small"}).base_model == "acme"


def test_the_card_goes_before_the_licence_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(MIT)
    assert read_origin(tmp_path, {}).licence == Licence("mit")
    (tmp_path / "README.md").write_text(CARD.format("apache-2.0", "[en, fr]"))
    origin = read_origin(tmp_path, {})
    assert origin.licence == Licence("apache-2.0")
    assert origin.languages == ("en", "fr")


def test_a_named_licence_of_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD.format("other\nlicense_name: acme\nlicense_link: LICENSE", "en"))
    origin = read_origin(tmp_path, {})
    assert origin.licence == Licence("other", "acme", "LICENSE")
    assert origin.languages == ("en",)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (APACHE, Licence("apache-2.0")),
        (MIT, Licence("mit")),
        ("\nACME 3.2 COMMUNITY LICENSE\nYou may ...", Licence("other", "acme-3.2-community-license", "LICENCE.txt")),
    ],
)
def test_licence_files_are_recognised_or_linked(text: str, licence: Licence, tmp_path: Path) -> None:
    (tmp_path / "LICENCE.txt").write_text(text)
    assert read_origin(tmp_path, {}).licence == licence


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- a\n- b\n---\n", "no metadata", "\xff"])
def test_a_damaged_card_is_no_card(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_origin(tmp_path, {}).licence is None


def test_what_a_gguf_says_is_read_back(tmp_path: Path) -> None:
    write_gguf_card(
        {
            "general.name": "Small 1B: the 'best'",
            "general.license": "other",
            "general.license.name": "acme",
            "general.license.link": "https://example.org/terms",
            "general.languages": ["en"],
            "general.source.repo_url": "https://huggingface.co/acme/small-1b",
        },
        tmp_path,
        Path("small-q8_0.gguf"),
    )
    origin = read_origin(tmp_path, {})
    assert origin.base_model == "acme/small-1b"
    assert origin.licence == Licence("other", "acme", "https://example.org/terms")
    assert origin.languages == ("en",)


def test_a_gguf_that_says_nothing(tmp_path: Path) -> None:
    write_gguf_card({"general.architecture": "llama"}, tmp_path, Path("small-q8_0.gguf"))
    assert read_origin(tmp_path, {}).to_dict() == {"base_model": "small-q8_0", "license": None, "language": []}


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Gemma 3 270m", "Gemma 3 270m"),
        (" Gemma\n3 ", "Gemma 3"),
        ("/home/me/gemma", "gemma-q4"),
        (".", "gemma-q4"),
        ("", "gemma-q4"),
    ],
)
def test_a_gguf_is_called_by_its_name_or_its_file(name: str, title: str, tmp_path: Path) -> None:
    write_gguf_card({"general.name": name}, tmp_path, Path("/data/gemma-q4-00001-of-00002.gguf"))
    assert read_origin(tmp_path, {}).base_model == title
