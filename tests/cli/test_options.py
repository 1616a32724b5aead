"""How much there is to set on the command line, and that what is only for studies is not there but in Python."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import moesaic
from moesaic.cli.main import app
from moesaic.cli.options import make_settings, with_pairs
from moesaic.distill.config import DistillConfig
from moesaic.errors import InputError
from moesaic.methods import METHODS, get_config
from moesaic.options import settable, study
from moesaic.targets.base import TargetOptions
from moesaic.train.config import TrainConfig
from moesaic.tune.config import TuneConfig
from tests.tiny_models import build_tiny

MOST = 140
DOCS = Path(__file__).parents[2] / "docs" / "methods"
FLAGS_TOO = {"layout", "active"}
"""Options of methods that a flag of the same name sets: one thing, said in two ways."""


def flags() -> set[str]:
    """All that begin with two dashes, once each, over all verbs. Nothing is set by `--help` and `--version`."""
    group: Any = typer.main.get_command(app)
    parameters = [parameter for verb in (group, *group.commands.values()) for parameter in verb.params]
    return {
        name
        for parameter in parameters
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name != "--version"
    }


def test_there_is_not_more_to_set_than_a_person_can_read() -> None:
    keys = {f"{name}: {key}" for name in METHODS for key, _ in settable(get_config(name)) if key not in FLAGS_TOO}
    verbs = {"tune": TuneConfig, "distill": DistillConfig, "export": TargetOptions}
    keys |= {
        key if key.startswith("train.") else f"{verb}: {key}"
        for verb, model in verbs.items()
        for key, _ in settable(model)
    }
    keys = {re.sub(r"^\w+: train\.", "train.", key) for key in keys}  # of tune and of tomoe: the same
    everything = sorted(flags() | keys)
    assert len(everything) <= MOST, f"{len(everything)}: {', '.join(everything)}"


class Inner(BaseModel):
    seen: int = 1
    hidden: int = study(default=2)


class Outer(BaseModel):
    plain: int = 0
    inner: Inner = Inner()
    perhaps: Inner | None = None
    flagged: Inner = study(default=Inner(), instead="--flag")


def test_studies_and_what_is_inside_them_cannot_be_set() -> None:
    assert [name for name, _ in settable(Outer)] == ["plain", "inner.seen", "perhaps", "perhaps.seen"]


@pytest.mark.parametrize(
    ("option", "message", "hint"),
    [
        ("inner.hidden=3", "--set does not take inner.hidden", "call({'inner': {'hidden': 3}})"),
        ("inner={seen: 1, hidden: 3}", "--set does not take inner.hidden", "call({'inner': {'hidden': 3}})"),
        ("perhaps.hidden=3", "--set does not take perhaps.hidden", "a settings file"),
        ("flagged.seen=3", "--set does not take flagged.seen", "give --flag"),
    ],
)
def test_a_study_is_refused_and_the_hint_says_where_it_is_taken(option: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as refused:
        with_pairs({}, [option], Outer, "outer", "call({})")
    assert message in str(refused.value)
    assert hint in refused.value.hint


def test_dots_change_one_key_of_what_the_file_says() -> None:
    file = {"inner": {"seen": 5, "hidden": 7}}
    found = with_pairs(file, ["inner.seen=6", "plain=1"], Outer, "outer", "")
    assert found == {"inner": {"seen": 6, "hidden": 7}, "plain": 1}
    assert file == {"inner": {"seen": 5, "hidden": 7}}


@pytest.mark.parametrize("name", METHODS)
def test_methods_lists_what_set_takes_and_the_page_names_the_rest(name: str) -> None:
    config = get_config(name)
    listed = CliRunner().invoke(app, ["methods", name]).output
    shown = re.findall(r"^  --set ([a-z_.]+)=(.*)$", listed, re.MULTILINE)
    assert [key for key, _ in shown] == [key for key, _ in settable(config)]
    assert make_settings(**_FLAGS | {"method": name, "options": [f"{key}={value}" for key, value in shown]})
    studies = set(config.model_fields) - {key.partition(".")[0] for key, _ in settable(config)}
    page = DOCS / f"{name}.md"
    text = (page if page.exists() else DOCS / "controls.md").read_text(encoding="utf-8")
    said = re.search(r"^Only in Python and settings files: (.*?)\.$", text, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([a-z_.]+)`", said[1] if said else "")) - set(_TRAIN) == studies


_TRAIN = [f"train.{key}" for key in TrainConfig.model_fields]
_FLAGS: dict[str, Any] = dict.fromkeys(inspect.signature(make_settings).parameters)


def test_python_and_settings_files_take_a_study(tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    options = {"layout": "S0A2E4", "rounds": 3}
    made = moesaic.convert(dense, tmp_path / "out", method="moefication", options=options)
    assert made.blueprint.config["rounds"] == 3
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"method": "moefication", "options": options}))
    flagged = make_settings(**_FLAGS | {"config": file, "method": None, "options": ["expert_width=8"]})
    assert flagged.options == options | {"expert_width": 8}
    with pytest.raises(InputError, match="--set does not take rounds"):
        make_settings(**_FLAGS | {"config": file, "method": None, "options": ["rounds=4"]})
