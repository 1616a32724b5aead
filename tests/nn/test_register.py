"""Registration with transformers' Auto classes, in fresh processes: by whom it is done, and loading without moesaic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_relative_imports

from moesaic.blueprint.layer import Router
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.jobs.verify import check_tensors
from moesaic.nn import modeling_moesaic
from moesaic.targets.moesaic import MODELLING_FILES
from tests.nn.attention import attention_plans
from tests.nn.folders import convert_by_hand
from tests.nn.plans import plan_of, random_members
from tests.targets.helpers import write

LOAD = "model = AutoModelForCausalLM.from_pretrained({folder!r}{options}); print(type(model).__module__)"


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(convert_by_hand("llama", tiny("llama"), tmp_path_factory.mktemp("register") / "out"))


def run(code: str, modules_cache: Path) -> str:
    environment = os.environ | {"HF_MODULES_CACHE": str(modules_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OURS = "moesaic.nn.modeling_moesaic"
AUTO = "from transformers import AutoModelForCausalLM\n"


@pytest.mark.parametrize(
    "before",
    [
        "import moesaic; moesaic.register(); moesaic.register()\n" + AUTO,
        AUTO + "import moesaic\n",
        "import transformers; import moesaic\n" + AUTO,
    ],
)
def test_folders_load_once_it_is_registered(before: str, folder: str, tmp_path: Path) -> None:
    assert run(before + LOAD.format(folder=folder, options=""), tmp_path) == OURS


def test_importing_moesaic_first_changes_nothing_about_imports(folder: str, tmp_path: Path) -> None:
    code = (
        "import sys; finders = list(sys.meta_path)\n"
        "import moesaic\n"
        "assert sys.meta_path == finders\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        f"{AUTO}"
        "try:\n"
        f"    AutoModelForCausalLM.from_pretrained({folder!r})\n"
        "except ValueError as error:\n"
        "    print('trust_remote_code=True' in str(error))\n"
    )
    assert run(code, tmp_path).endswith("True")


@pytest.mark.parametrize(
    "load", [lambda out: load_model(out, "auto"), load_tokenizer, lambda out: check_tensors(Checkpoint(out))]
)
def test_what_loads_a_folder_registers_by_itself(load: Callable[[Path], object], folder: str) -> None:
    CONFIG_MAPPING._extra_content.pop("moesaic", None)
    load(Path(folder))
    assert "moesaic" in CONFIG_MAPPING


def test_the_modelling_file_names_every_file_of_the_architecture() -> None:
    named = get_relative_imports(str(Path(modeling_moesaic.__file__)))
    # transformers up to 5.6 copies only those for trust_remote_code, and not what they import in turn.
    assert {f"{name}.py" for name in named} == set(MODELLING_FILES) - {"modeling_moesaic.py"}


def test_without_moesaic_the_folder_loads_as_remote_code_and_can_be_saved(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    # All modelling files are at work: overlapping experts, pruned attention.
    plan = replace(plan_of(random_members(4, 37, 0.5)), union=True)
    plan = replace(plan, router=Router("linear", {"weight": torch.randn(4, 32)}))
    plans = {"model.layers.0.mlp": plan}
    folder = str(write(tiny("llama"), plans, tmp_path / "out", "moesaic", attention=attention_plans(tiny("llama"))))
    again = str(tmp_path / "again")
    code = (
        "import sys; sys.modules['moesaic'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{LOAD.format(folder=folder, options=', trust_remote_code=True')}\n"
        "assert type(model.model.layers[0].mlp).__name__ == 'UnionFeedForward'\n"
        "assert type(model.model.layers[0].self_attn).__name__ == 'PrunedAttention'\n"
        "ids = torch.arange(2, 9)[None]; expected = model(ids).logits\n"
        f"model.save_pretrained({again!r})\n"
        f"other = AutoModelForCausalLM.from_pretrained({again!r}, trust_remote_code=True)\n"
        "assert torch.equal(other(ids).logits, expected)\n"
        f"assert AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)('expert').input_ids\n"
    )
    assert run(code, tmp_path / "cache").startswith("transformers_modules.")
