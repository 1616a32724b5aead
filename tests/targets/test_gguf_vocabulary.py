"""Tokenizers in GGUF files: llama.cpp splits texts into the same tokens as the folder's tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as splits
from tokenizers.processors import TemplateProcessing

from moesaic.calibration.samples import evaluation_text
from moesaic.errors import CheckpointError, InputError, UnsupportedModelError, VerificationError
from moesaic.evaluate.llama_cpp import LlamaCpp, available
from moesaic.evaluate.tokenizer_parity import check_tokens
from moesaic.jobs.export_gguf import export_gguf
from tests.targets.helpers import write_gguf
from tests.tiny_models import build_tiny

needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
VOCABULARY = 1200
TRAINING = evaluation_text()[:40_000]
HARD = [
    "Hello world, it's 12345 dollars!  We're  here...\n\n\tTabs and   spaces  \n",
    "naïve café 北京 2024年 HTTPServer CamelCase's DON'T 3.14e-10 a/b/c\r\n x  ",
    "<|im_start|>user\nhi<|im_end|> and <think> 1 < 2",
]
TEXTS = [*TRAINING[5_000:12_000].split("\n"), *HARD]
# As they stand in the tokenizer.json of Qwen2, Llama 3 and Mistral NeMo.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = (
    LEAD + UPPER + "*" + LOWER + "+|" + LEAD + UPPER + "+" + LOWER + "*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(*before: Any, regex: bool = False) -> Any:
    return splits.Sequence([*before, splits.ByteLevel(add_prefix_space=False, use_regex=regex)])


def _split(pattern: str) -> Any:
    return splits.Split(Regex(pattern), "isolated")


# llama.cpp's name -> (split, ignore_merges)
BYTE_LEVEL: dict[str, tuple[Any, bool]] = {
    "gpt-2": (_bytes(regex=True), False),
    "smollm": (_bytes(splits.Digits(individual_digits=True), regex=True), False),
    "qwen2": (_bytes(_split(QWEN2)), False),
    "llama-bpe": (_bytes(_split(LLAMA3)), True),
    "dbrx": (_bytes(_split(LLAMA3)), False),
    "tekken": (_bytes(_split(TEKKEN)), True),
}


def byte_level(split: Any, ignore_merges: bool = False) -> Tokenizer:
    """A BPE whose merges were learnt across words, so that where the text is split decides about tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splits.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(splits.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*HARD * 20, *TRAINING.split("\n")], trainer)
    tokenizer.pre_tokenizer = split
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A BPE as transformers makes it from a SentencePiece model: spaces as ▁, unknown characters as bytes, and BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"]
    units = [*specials, *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=units, show_progress=False)
    tokenizer.train_from_iterator(TRAINING.split(" "), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[..., Path]:
    """A tiny model with a tokenizer; keywords go to tokenizer_config.json."""

    def make(tokenizer: Tokenizer, **settings: Any) -> Path:
        folder = build_tiny("llama", tmp_path / "model", vocab_size=VOCABULARY)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def values(file: Path) -> dict[str, Any]:
    return {key: entry.contents() for key, entry in gguf.GGUFReader(file).fields.items()}


def differing(file: Path, tokenizer: Tokenizer) -> list[str]:
    """Texts that llama.cpp splits differently."""
    with LlamaCpp(file) as engine:
        return [text for text in TEXTS if text and engine.tokenize(text) != _encode(tokenizer, text)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@needs_llama_cpp
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokens_are_the_same_in_llama_cpp(name: str, folder_with: Any, tmp_path: Path) -> None:
    tokenizer = byte_level(*BYTE_LEVEL[name])
    written = write_gguf(folder_with(tokenizer), tmp_path / "model.gguf", "f32")
    assert values(written.output)["tokenizer.ggml.pre"] == name
    assert differing(written.output, tokenizer) == []


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "other"),
    [("gpt-2", "smollm"), ("smollm", "gpt-2"), ("qwen2", "dbrx"), ("llama-bpe", "qwen2"), ("tekken", "llama-bpe")],
)
def test_another_name_for_the_split_would_be_noticed(
    name: str, other: str, folder_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level(*BYTE_LEVEL[name])
    monkeypatch.setattr("moesaic.gguf.vocabulary.pretokenizer_name", lambda content: other)
    assert differing(write_gguf(folder_with(tokenizer), tmp_path / "model.gguf", "f32").output, tokenizer)


@needs_llama_cpp
def test_sentencepiece_tokens_are_the_same_in_llama_cpp(folder_with: Any, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    folder = folder_with(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert differing(written.output, tokenizer) == []
    with LlamaCpp(written.output) as engine:
        assert engine.tokenize("two words", special=True) == tokenizer.encode("two words").ids


def test_special_tokens_types_and_template_are_carried(folder_with: Any, tmp_path: Path) -> None:
    tokenizer = byte_level(*BYTE_LEVEL["smollm"])
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    folder = folder_with(tokenizer, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = values(write_gguf(folder, tmp_path / "model.gguf", "f32").output)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert len(tokens) == len(types) == VOCABULARY
    kinds = gguf.TokenType
    assert types[tokens.index("<|im_start|>")] == kinds.CONTROL
    assert types[tokens.index("<think>")] == kinds.USER_DEFINED
    assert types[tokens.index("e")] == kinds.NORMAL
    assert (tokens[-1], types[-1]) == (f"[PAD{VOCABULARY - 1}]", kinds.UNUSED)


@needs_llama_cpp
def test_a_tokenizer_is_copied_from_another_gguf(folder_with: Any, tmp_path: Path) -> None:
    tokenizer = byte_level(*BYTE_LEVEL["smollm"])
    folder = folder_with(tokenizer, bos_token="<|im_start|>", chat_template="{{ messages }}")
    first = write_gguf(folder, tmp_path / "first.gguf", "f32").output
    (folder / "tokenizer.json").unlink()
    second = write_gguf(folder, tmp_path / "second.gguf", "f16", tokenizer_gguf=first).output
    before, after = values(first), values(second)
    assert {key for key in before if key.startswith("tokenizer.")} == {k for k in after if k.startswith("tokenizer.")}
    assert all(after[key] == value for key, value in before.items() if key.startswith("tokenizer."))
    assert differing(second, tokenizer) == []


def test_tokenizers_that_do_not_fit_are_refused(folder_with: Any, tmp_path: Path) -> None:
    folder = folder_with(byte_level(*BYTE_LEVEL["smollm"]))
    large = write_gguf(folder, tmp_path / "large.gguf", "f32").output
    small = build_tiny("llama", tmp_path / "small")
    with pytest.raises(InputError, match="1200 tokens, the model 300 embeddings"):
        write_gguf(small, tmp_path / "out.gguf", tokenizer_gguf=large)
    with pytest.raises(InputError, match="cannot be read as a GGUF"):
        write_gguf(small, tmp_path / "out.gguf", tokenizer_gguf=small / "config.json")
    (small / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        write_gguf(small, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("split", "model", "reason"),
    [
        (splits.Whitespace(), None, "splits text in a way"),
        (_bytes(_split(r"\p{N}{1,4}|\s+")), None, "splits text in a way"),
        (None, models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "a WordPiece tokenizer"),
    ],
)
def test_unknown_tokenizers_are_refused(split: Any, model: Any, reason: str, folder_with: Any, tmp_path: Path) -> None:
    folder = folder_with(byte_level(split) if model is None else Tokenizer(model))
    with pytest.raises(UnsupportedModelError, match=reason):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def plain(**parts: Any) -> Tokenizer:
    """A GPT-2-like tokenizer with other parts."""
    tokenizer = byte_level(_bytes(regex=True))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(token: AddedToken, tokenizer: Tokenizer | None = None) -> Tokenizer:
    tokenizer = tokenizer or plain()
    tokenizer.add_tokens([token])
    return tokenizer


def metaspace(scheme: Any, split: bool = False) -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = splits.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


PREFIX = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
# the part that llama.cpp leaves out -> (tokenizer, tokenizer_config.json)
LEFT_OUT: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "the normalizer Lowercase": (lambda: plain(normalizer=normalizers.Lowercase()), {}),
    "the normalizer NFKC": (lambda: plain(normalizer=normalizers.NFKC()), {}),
    "the normalizer Strip": (lambda: plain(normalizer=normalizers.Sequence([normalizers.Strip()])), {}),
    "ByteLevel with add_prefix_space": (lambda: plain(pre_tokenizer=splits.ByteLevel(add_prefix_space=True)), {}),
    "add_prefix_space of tokenizer_config": (plain, {"add_prefix_space": True}),
    "split_special_tokens": (plain, {"split_special_tokens": True}),
    "(single_word)": (lambda: with_token(AddedToken("one", single_word=True, normalized=False)), {}),
    "(lstrip)": (lambda: with_token(AddedToken("<X>", lstrip=True)), {}),
    "'<Y>' takes the spaces after it (rstrip)": (lambda: with_token(AddedToken("<Y>", rstrip=True)), {}),
    "(normalized)": (lambda: with_token(AddedToken("<X>", normalized=True), sentencepiece()), {}),
    "post-processor makes '<|im_start|> a'": (lambda: plain(post_processor=PREFIX), {"bos_token": "<|im_end|>"}),
    "the pre-tokenizer Metaspace, which puts a space before a text (first)": (lambda: metaspace("first"), {}),
    "the pre-tokenizer Metaspace": (lambda: metaspace("never", split=True), {}),
    "makes ▁ of a space": (lambda: sentencepiece_with(normalizer=None), {}),
}


def sentencepiece_with(**parts: Any) -> Tokenizer:
    tokenizer = sentencepiece()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize("part", LEFT_OUT)
def test_parts_that_llama_cpp_leaves_out_are_refused_by_name(part: str, folder_with: Any, tmp_path: Path) -> None:
    make, settings = LEFT_OUT[part]
    with pytest.raises(UnsupportedModelError, match=re.escape(part)):
        write_gguf(folder_with(make(), **settings), tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


ACCEPTED: dict[str, Callable[[], Tokenizer]] = {
    "nfc": lambda: plain(normalizer=normalizers.NFC()),
    "added words": lambda: with_token(AddedToken("there"), with_token(AddedToken("the<X>"))),
    "cut and padded": lambda: cut_and_padded(plain()),
    "sentencepiece": sentencepiece,
    "metaspace without a prefix": lambda: metaspace("never"),
    **{name: (lambda name=name: byte_level(*BYTE_LEVEL[name])) for name in BYTE_LEVEL},
}


def cut_and_padded(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


@needs_llama_cpp
@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_texts_have_the_same_tokens_in_llama_cpp(name: str, folder_with: Any, tmp_path: Path) -> None:
    folder = folder_with(ACCEPTED[name](), bos_token="<s>")
    check_tokens(write_gguf(folder, tmp_path / "model.gguf", "f32").output, folder)


@needs_llama_cpp
def test_tokens_that_differ_refuse_the_file(folder_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(plain(normalizer=normalizers.Lowercase()))
    monkeypatch.setattr("moesaic.gguf.vocabulary.check_parts", lambda content, settings: None)
    with pytest.raises(VerificationError, match=r"makes other tokens of .The Other"):
        export_gguf(folder, tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_tokenizer_is_one_line(folder_with: Any, tmp_path: Path) -> None:
    folder = folder_with(plain())
    for text in ("{}", "[1]", '{"model": null}', "half"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
            write_gguf(folder, tmp_path / "model.gguf")
