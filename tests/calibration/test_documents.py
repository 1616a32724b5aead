"""Calibration text as people have it: chats, arrays, tables, packed files, odd names; each fault in one line."""

from __future__ import annotations

import copy
import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.calibration.text import build_windows, read_source
from moesaic.errors import InputError
from tests.tiny_models import VOCAB, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
SHARED = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
SAID = "<user>ask<assistant>say"


def chatting(template: str | None = TEMPLATE) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def read(source: object, tokenizer: Any = None) -> str:
    return read_source(Source.parse(str(source)), 10**6, tokenizer or chatting()).text


def lines(*records: Any) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


# name: (file, content, what is appended to its path, text that is read)
READ: dict[str, tuple[str, bytes, str, str]] = {
    "messages": ("a.jsonl", lines({"messages": CHAT}), "", SAID),
    "messages by name": ("a.jsonl", lines({"text": "no", "messages": CHAT}), ":messages", SAID),
    "ShareGPT": ("a.jsonl", lines({"conversations": SHARED}), "", SAID),
    "parts of text": (
        "a.jsonl",
        lines(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
        ),
        "",
        "<user>ab",
    ),
    "array": ("a.json", json.dumps([{"text": "a", "id": 1}, {"text": "b"}]).encode(), "", "a\n\nb"),
    "array by field": ("a.json", json.dumps([{"text": "a", "body": "b"}]).encode(), ":body", "b"),
    "array of texts": ("a.json", b'["a", "b"]', "", "a\n\nb"),
    "array of chats": ("a.json", json.dumps([CHAT]).encode(), "", SAID),
    "array below a key": ("a.json", json.dumps({"version": 1, "data": [{"text": "a"}]}).encode(), "", "a"),
    "one object": ("a.json", b'{"text": "a"}', "", "a"),
    "lines in .json": ("a.json", lines({"text": "a"}, {"text": "b"}), "", "a\n\nb"),
    "csv": ("a.csv", b'id,text\r\n1,"a ""q"", b"\r\n2,"c\nd"\r\n', "", 'a "q", b\n\nc\nd'),
    "long csv": ("a.csv", b"text\n" + b"x" * 200_000, "", "x" * 200_000),
    "tsv by field": ("a.tsv", b"id\tbody\n1\ta, b\n", ":body", "a, b"),
    "packed": ("a.jsonl.gz", gzip.compress(lines({"text": "a"})), "", "a"),
    "packed by field": ("a.JSONL.gz", gzip.compress(lines({"body": "a"})), ":body", "a"),
    "packed text": ("a.txt.gz", gzip.compress(b"a"), "", "a"),
    "BOM and CRLF": (
        "a.jsonl",
        b"\xef\xbb\xbf" + lines({"text": "a"}) + b"\r\n\r\n" + lines({"text": "b"}),
        "",
        "a\n\nb",
    ),
    "nulls": ("a.jsonl", lines({"text": None}, {"text": ""}, {"text": "a"}), "", "a"),
    "whole pair": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}', "", "\N{GRINNING FACE}"),
    "= in the path": ("run=3/date=2024/a.txt", b"a", "", "a"),
    "= at the end": ("text=2024", b"a", "", "a"),
    "= and a weight": ("text=2024", b"a", "=0.5", "a"),
    "field-like name": ("a.jsonl:part", b"a", "", "a"),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str, tmp_path: Path) -> None:
    file, content, more, text = READ[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(content)
    assert read(f"{tmp_path / file}{more}") == text


COLUMNS: dict[str, tuple[pa.Array, str]] = {
    "chat messages": (pa.array([CHAT]), SAID),
    "lists of texts": (pa.array([["a", "b"], None, ["c"]]), "a\n\nb\n\nc"),
    "categories": (pa.array(["a", "b", "a"]).dictionary_encode(), "a\n\nb\n\na"),
    "views": (pa.array(["a"], type=pa.string_view()), "a"),
    "bytes": (pa.array([b"a"]), "a"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_parquet(name: str, tmp_path: Path) -> None:
    column, text = COLUMNS[name]
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == text


def test_weights_and_fields_behind_paths_that_exist(tmp_path: Path) -> None:
    (tmp_path / "text=2024").write_text("a")
    (tmp_path / "a.jsonl:part").write_text("a")
    assert Source.parse(f"{tmp_path}/text=2024").weight == 1
    weighed = Source.parse(f"{tmp_path}/text=2024=3")
    assert (weighed.name, weighed.weight) == (f"{tmp_path}/text=2024", 3)
    assert Source.parse(f"{tmp_path}/a.jsonl:part").field is None
    assert Source.parse(f"{tmp_path}/a.jsonl:text=2").field == "text"


def test_what_the_user_should_know_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": CHAT}))
    found = read_source(Source.parse(f"{tmp_path}/a.jsonl"), 100, chatting(None))
    assert found.text == "ask\n\nsay"
    assert "no chat template" in found.notes[0]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud83d"}')
    found = read_source(Source.parse(f"{tmp_path}/b.jsonl"), 100, chatting())
    assert found.text == "half \ufffd"
    assert "lone surrogates" in found.notes[0]


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"caf\xe9",))
    writer.start()
    with pytest.raises(InputError, match="not UTF-8: byte 0xe9"):
        read(tmp_path / "pipe")
    writer.join()


REFUSAL = chatting("{{ raise_exception('roles must alternate') }}")
# name: (file, content, what is appended to its path, part of message and hint)
REFUSED: dict[str, tuple[str, bytes, str, str]] = {
    "UTF-16": ("a.txt", "text".encode("utf-16"), "", r"is UTF-16 text .iconv -f utf-16 -t utf-8 \S*a.txt > NEW"),
    "Latin-1": ("a.jsonl", b'{"text": "caf\xe9"}', "", r"not UTF-8: byte 0xe9.*iconv -f latin1"),
    "zstd": ("a.zst", b"\x28\xb5\x2f\xfd\x99", "", r"compressed by zstd .unpack it: zstd -d"),
    "gzip without its suffix": ("a.txt", gzip.compress(b"a"), "", r"compressed by gzip .*suffix \.gz"),
    "damaged gzip": ("a.gz", gzip.compress(os.urandom(500))[:300], "", "a.gz is damaged"),
    "no gzip": ("a.txt.gz", b"plain", "", "a.txt.gz is damaged: Not a gzipped file"),
    "number": (
        "a.jsonl",
        lines({"text": 5, "b": "x"}),
        "",
        "line 1: 'text' is neither text nor chat.*type int .choose another field: b; write a.jsonl:FIELD",
    ),
    "number alone": ("a.jsonl", lines({"text": 5}), "", "of the type int .take this record out"),
    "no JSON": ("a.json", b'[{"text": ]', "", "a.json is not valid JSON: Expecting value in line 1"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "", "line 1 is not valid JSON: nested too deeply"),
    "array of numbers": ("a.json", b"[1]", "", "record 1 is no JSON object"),
    "array without the field": (
        "a.json",
        b'[{"body": "a"}]',
        "",
        "record 1 has no text field 'text'.*body.*a.json:FIELD",
    ),
    "csv without the field": ("a.csv", b"id,body\n1,a\n", "", "no text field 'text'.*id, body; write a.csv:FIELD"),
    "template": ("a.jsonl", lines({"messages": CHAT}), "", "refuses the messages: roles must alternate"),
    "folder of records": ("f/a.jsonl", lines({"text": "a"}), "", r"no text files in folder .*--calib \S*f/a.jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    file, content, more, message = REFUSED[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    place = tmp_path / file if "/" not in file else tmp_path / file.partition("/")[0]
    with pytest.raises(InputError, match=message) as caught:
        read(f"{place}{more}", REFUSAL)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda b: b[:60] + bytes(20) + b[80:], lambda b: b[:40]])
def test_damaged_parquet(make: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["some text"] * 50}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(make((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(InputError, match=r"a.parquet is (damaged|not a parquet file)"):
        read(tmp_path / "a.parquet")


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    tokenizer = chatting()
    tokenizer.add_tokens(["<extra>"])
    (tmp_path / "a.txt").write_text("an <extra> word " * 20)
    config = CalibrationConfig(sources=[str(tmp_path / "a.txt")], tokens=32, window=16)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"writes token {VOCAB}, '<extra>', but the model has only {VOCAB}.*resize"):
        build_windows(config, tokenizer, None, VOCAB)
    assert build_windows(config, tokenizer, None, VOCAB + 1).ids_NW.max() == VOCAB
