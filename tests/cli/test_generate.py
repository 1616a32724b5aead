"""Hearing a model: one answer, a talk, the dense model beside it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from tests.cli.conftest import Run

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[said]{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model with a chat template, and its conversion with all neurons on."""
    root = tmp_path_factory.mktemp("spoken")
    dense = shutil.copytree(tiny("llama"), root / "dense")
    (dense / "chat_template.jinja").write_text(TEMPLATE)
    options = {"active": 1.0}
    return dense, moesaic.convert(dense, root / "out", method="neuron_experts", options=options).output


def greedy(folder: Path, text: str, tokens: int) -> str:
    """What transformers generates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_what_transformers_generates(folders: tuple[Path, Path], run: Run) -> None:
    dense, out = folders
    code, printed, _ = run("generate", out, "the harbour", "--baseline", dense, "--tokens", "5", "--json")
    assert code == 0
    said = json.loads(printed)
    wanted = greedy(dense, "[user] the harbour [said]", 5)
    assert said["dense"]["text"] == wanted
    assert said["model"]["text"] == wanted  # all neurons are on
    _, printed, _ = run("generate", dense, "the harbour", "--plain", "--tokens", "5", "--json")
    assert json.loads(printed)["model"]["text"] == greedy(dense, "the harbour", 5)


def test_an_answer_is_printed_while_it_comes(folders: tuple[Path, Path], run: Run) -> None:
    code, printed, err = run("generate", folders[0], "the harbour", "--tokens", "5")
    assert code == 0
    assert printed.strip() == greedy(folders[0], "[user] the harbour [said]", 5).strip()
    assert "tokens" in err
    code, _, err = run("generate", folders[0], "  ")
    assert (code, "the prompt is empty" in err) == (1, True)


def test_a_talk_remembers_until_it_is_told_to_forget(
    folders: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        code, printed, _ = run("chat", folders[0], "--tokens", "4")
        assert code == 0
        return printed.strip()

    dense = folders[0]
    first = greedy(dense, "[user] hello [said]", 4)
    second = greedy(dense, f"[user] hello [assistant] {first} [user] again [said]", 4)
    assert talk("hello", "again", "/quit", "never read") == f"{first}\n{second}".strip()
    assert talk("hello", "/new", "hello") == f"{first}\n{first}".strip()
