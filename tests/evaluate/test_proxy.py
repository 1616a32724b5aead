from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moesaic.errors import CheckpointError, InputError
from moesaic.evaluate import proxy
from moesaic.evaluate.proxy import ProxyPerplexity, proxy_change, proxy_perplexity, proxy_texts, texts_digest

VOCABULARY = 257  # 256 bytes and BOS


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0} | {token: i + 1 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_the_texts_are_the_released_ones() -> None:
    texts = proxy_texts()
    assert len(texts) == len(set(texts)) == 8
    assert all(200 < len(text) < 1000 for text in texts)
    assert texts_digest(texts) == proxy.TEXTS_SHA256
    assert texts_digest([*texts[:-1], texts[-1] + " "]) != proxy.TEXTS_SHA256
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"])


def test_changed_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "TEXTS_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="were changed"):
        proxy_texts()


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = proxy_perplexity(model, byte_tokenizer())
    assert result.micro == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.macro == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.text_tokens == tuple(len(text.encode()) - 1 for text in proxy_texts())


def test_the_loss_is_that_of_the_next_token() -> None:
    model, tokenizer, text = tiny_model(), byte_tokenizer(), "a short text"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    result = proxy_perplexity(model, tokenizer, [text])
    assert result.micro == pytest.approx(math.exp(expected), rel=1e-5)


def test_order_does_not_matter_and_equal_texts_make_micro_and_macro_equal() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    texts = ["one", "a longer second text", "and 3"]
    forward, backward = (proxy_perplexity(model, tokenizer, t) for t in (texts, texts[::-1]))
    assert forward.micro == pytest.approx(backward.micro, rel=1e-12)
    assert forward.macro == pytest.approx(backward.macro, rel=1e-12)
    assert forward.micro != pytest.approx(forward.macro, rel=1e-3)
    same = proxy_perplexity(model, tokenizer, ["the same"] * 4)
    assert same.micro == pytest.approx(same.macro, rel=1e-12)


def test_bos_is_there_when_the_tokenizer_adds_one() -> None:
    model = tiny_model()
    with_bos = proxy_perplexity(model, byte_tokenizer(bos=True), ["abc"])
    assert with_bos.text_tokens == (3,)
    assert proxy_perplexity(model, byte_tokenizer(), ["abc"]).text_tokens == (2,)


def test_chat_template_wraps_each_text_and_is_said_in_the_name() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer(bos=True)
    with pytest.raises(InputError, match="no chat template"):
        proxy_perplexity(model, tokenizer, ["abc"], chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    chat = proxy_perplexity(model, tokenizer, ["abc"], chat=True)
    assert chat.text_tokens == (len("[user]abc") - 1,)  # the template's own tokens, no second BOS
    assert chat.name != proxy_perplexity(model, tokenizer, ["abc"]).name


@pytest.mark.parametrize("texts", [[], ["fine", "x"]])
def test_texts_without_a_prediction_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError):
        proxy_perplexity(tiny_model(), byte_tokenizer(), texts)


def result_of(text_nll: tuple[float, ...], tokens: tuple[int, ...], name: str = "proxy") -> ProxyPerplexity:
    return ProxyPerplexity(name, text_nll, tokens)


def test_change_is_that_of_the_micro_perplexity_with_a_paired_interval() -> None:
    tokens = (100, 150, 80, 120)
    dense = result_of((310.0, 420.0, 200.0, 400.0), tokens)
    model = result_of((312.0, 424.0, 201.0, 401.0), tokens)
    change = proxy_change(model, dense)
    assert change.percent == pytest.approx(100 * (model.micro / dense.micro - 1), rel=1e-9)
    per_text = [100 * math.expm1(d / n) for d, n in zip((2.0, 4.0, 1.0, 1.0), tokens, strict=True)]
    assert min(per_text) <= change.low <= change.percent <= change.high <= max(per_text)
    assert change.low < change.high
    assert proxy_change(model, dense) == change


def test_equal_models_change_by_nothing_and_a_constant_factor_has_no_spread() -> None:
    tokens = (10, 30)
    dense = result_of((30.0, 60.0), tokens)
    assert proxy_change(dense, dense).to_dict() == {"percent": 0.0, "low": 0.0, "high": 0.0}
    worse = result_of((31.0, 63.0), tokens)  # 0.1 nats per token in both
    change = proxy_change(worse, dense)
    for value in (change.low, change.percent, change.high):
        assert value == pytest.approx(100 * math.expm1(0.1))


def test_a_hopeless_model_is_infinite_and_not_a_crash() -> None:
    dense, broken = result_of((10.0,), (5,)), result_of((1e6,), (5,))
    assert broken.micro == broken.macro == math.inf
    assert proxy_change(broken, dense).percent == math.inf


@pytest.mark.parametrize("other", [result_of((1.0,), (5,), "other"), result_of((1.0,), (6,))])
def test_results_on_other_texts_are_not_compared(other: Any) -> None:
    with pytest.raises(InputError, match="cannot compare"):
        proxy_change(other, result_of((1.0,), (5,)))
