"""From sources to windows: what is read, where windows lie, who gets how many, and every error a user can make."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.calibration.text import _fingerprint, build_windows, largest_remainder, read_source
from moesaic.errors import InputError
from tests.tiny_models import tiny_tokenizer

LIMIT = 10**9


def windows(*sources: object, max_positions: int | None = None, **values: Any) -> Any:
    config = CalibrationConfig(sources=[str(source) for source in sources], **values)  # type: ignore[arg-type]
    return build_windows(config, tiny_tokenizer(), max_positions)


def read(source: object) -> str:
    return read_source(Source.parse(str(source)), LIMIT, tiny_tokenizer()).text


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_a_folder_is_read_in_order_of_its_paths_joined_by_blank_lines(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "second\r\n",
        "a/z.md": "first",
        "c.bin": "no",
        ".git/x.txt": "no",
        "d.txt": " ",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path) == "first\n\nsecond\n"


def test_jsonl_and_parquet_fields(tmp_path: Path) -> None:
    records = [{"text": "one", "body": "eins"}, {"text": "two", "body": "zwei"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([*records, {"text": None, "body": "drei"}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl") == "one\n\ntwo"
    assert read(f"{tmp_path / 'a.jsonl'}:body") == "eins\n\nzwei"
    assert read(tmp_path / "a.parquet") == "one\n\ntwo"
    assert read(f"{tmp_path / 'a.parquet'}:body") == "eins\n\nzwei\n\ndrei"


def test_a_long_text_is_cut_and_this_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100, encoding="utf-8")
    source = Source.parse(str(tmp_path / "a.txt"))
    assert read_source(source, 60, tiny_tokenizer()).text == "x" * 60
    assert read_source(source, 100, tiny_tokenizer()) == ("x" * 100, ())
    (tmp_path / "long.txt").write_text("word " * 1000, encoding="utf-8")
    assert "only its first 4,096 characters" in windows(tmp_path / "long.txt", tokens=64, window=32).notes[0]
    assert windows("tiny", tokens=64, window=32).notes == ()


def test_windows_are_pieces_of_the_text_that_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(400), encoding="utf-8")
    stream = tiny_tokenizer()(words(400))["input_ids"]
    built = windows(path, tokens=10 * 50, window=50)
    assert built.ids_NW.shape == (10, 50)
    assert built.ids_NW.dtype == torch.int64
    starts = sorted(_find(stream, row) for row in built.ids_NW.tolist())
    assert starts[0] >= 0
    assert all(after - before >= 50 for before, after in itertools.pairwise(starts))


def test_equal_seeds_give_equal_windows_and_other_seeds_others(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(400), encoding="utf-8")
    first, again, other = (windows(path, tokens=200, window=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids_NW, again.ids_NW)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_all_tokens_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(100), encoding="utf-8")
    stream = tiny_tokenizer()(words(100))["input_ids"]
    window = 10
    count = len(stream) // window
    built = windows(path, tokens=count * window, window=window)
    assert len({_find(stream, row) // window for row in built.ids_NW.tolist()}) == count


def test_sources_share_the_windows_by_weight(tmp_path: Path) -> None:
    for name, first in (("a.txt", 0), ("b.txt", 5000)):
        (tmp_path / name).write_text(words(500, first), encoding="utf-8")
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    built = windows(f"{a}=3", f"{b}=1", tokens=8 * 32, window=32)
    assert built.source_tokens == {str(a): 6 * 32, str(b): 2 * 32}
    assert built.ids_NW.shape == (8, 32)
    light = windows(f"{a}=9", f"{b}=1", tokens=2 * 32, window=32)
    assert light.source_tokens[str(b)] == 0
    assert "too light" in light.notes[0]


@pytest.mark.parametrize(
    ("tokens", "window", "max_positions", "shape", "noted"),
    [
        (100, 64, None, (2, 64), False),
        (40, 64, None, (1, 40), False),
        (100, 64, 32, (4, 32), True),
        (20, 64, 32, (1, 20), False),
        (64, 32, 32, (2, 32), False),
    ],
)
def test_window_is_clipped_to_the_tokens_and_to_the_model(
    tokens: int, window: int, max_positions: int | None, shape: tuple[int, int], noted: bool
) -> None:
    built = windows("tiny", tokens=tokens, window=window, max_positions=max_positions)
    assert tuple(built.ids_NW.shape) == shape
    assert bool(built.notes) == noted


def test_built_in_sources() -> None:
    built = windows("mix", tokens=8 * 32, window=32)
    assert built.source_tokens == {"wikitext": 128, "c4": 64, "code": 64}


def _bad_json(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n', encoding="utf-8")
    return str(folder / "a.jsonl")


def _no_field(folder: Path) -> str:
    (folder / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    return str(folder / "a.jsonl")


def _no_object(folder: Path) -> str:
    (folder / "a.jsonl").write_text("[1]\n", encoding="utf-8")
    return str(folder / "a.jsonl")


def _no_column(folder: Path) -> str:
    pq.write_table(pa.table({"text": ["x"], "size": [1]}), folder / "a.parquet")
    return f"{folder / 'a.parquet'}:size"


def _no_parquet(folder: Path) -> str:
    (folder / "a.parquet").write_text("x", encoding="utf-8")
    return str(folder / "a.parquet")


def _latin1(folder: Path) -> str:
    (folder / "a.txt").write_bytes("Müller".encode("latin-1"))
    return str(folder)


def _empty(folder: Path) -> str:
    (folder / "a.txt").write_text(" \n", encoding="utf-8")
    return str(folder)


def _short(folder: Path) -> str:
    (folder / "a.txt").write_text("a b c d", encoding="utf-8")
    return str(folder / "a.txt")


def _few(folder: Path) -> str:
    (folder / "a.txt").write_text("abcdefgh " * 9, encoding="utf-8")
    return str(folder / "a.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "nowhere.txt"), r"nowhere.txt' does not exist .*wikitext"),
        (str, "no text files in folder"),
        (_empty, "has no text"),
        (_latin1, "a.txt is not UTF-8"),
        (_bad_json, "a.jsonl line 2 is not valid JSON"),
        (_no_field, "line 1 has no text field 'text' .*body"),
        (_no_object, "line 1 is no JSON object"),
        (_no_column, "no text column 'size'"),
        (_no_parquet, "is not a parquet file"),
        (_short, r"has \d tokens, one window needs 32 .*--calib-window"),
        (_few, r"its share is 4 windows of 32 .*lower --calib-tokens"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        windows(make(tmp_path), tokens=128, window=32)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 40))
def test_largest_remainder_is_proportional_to_less_than_one(weights: list[float], total: int) -> None:
    counts = largest_remainder(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 for count, w in zip(counts, weights, strict=True))


def _find(stream: list[int], row: list[int]) -> int:
    places = [i for i in range(len(stream) - len(row) + 1) if stream[i : i + len(row)] == row]
    assert len(places) == 1
    return places[0]


def test_windows_of_sources_are_mixed_and_their_places_follow_the_seed(tmp_path: Path) -> None:
    for name, first in (("a.txt", 0), ("b.txt", 5000)):
        (tmp_path / name).write_text(words(2000, first), encoding="utf-8")
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    built = windows(a, b, tokens=32 * 16, window=16)
    of_a = {tuple(row) for row in windows(a, tokens=16 * 16, window=16).ids_NW.tolist()}
    is_a = [tuple(row) in of_a for row in built.ids_NW.tolist()]
    assert is_a != sorted(is_a, reverse=True)
    assert 0 < sum(is_a[-8:]) < 8  # what is held out at the end is of both
    one, other = (windows(a, tokens=200, window=50, seed=seed).ids_NW.tolist() for seed in (1, 2))
    assert sorted(one) != sorted(other)
    assert _fingerprint(built.ids_NW) != _fingerprint(built.ids_NW.flip(0))
