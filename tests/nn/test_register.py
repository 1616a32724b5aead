"""Registration with transformers' Auto classes, in fresh processes: in both import orders, and without moesaic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.blueprint.layer import Router
from tests.nn.attention import attention_plans
from tests.nn.folders import convert_by_hand
from tests.nn.test_union import plan_of, random_members
from tests.targets.helpers import write

LOAD = "model = AutoModelForCausalLM.from_pretrained({folder!r}{options}); print(type(model).__module__)"


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(convert_by_hand("llama", tiny("llama"), tmp_path_factory.mktemp("register") / "out"))


def run(code: str, modules_cache: Path) -> str:
    environment = os.environ | {"HF_MODULES_CACHE": str(modules_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_moesaic_before_transformers(folder: str, tmp_path: Path) -> None:
    code = (
        "import sys; import moesaic\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "from transformers import PreTrainedModel\n"  # imports the auto classes while it is itself half imported
        "from transformers import AutoModelForCausalLM\n"
        "assert '_ImportWatch' not in repr(sys.meta_path)\n"
    )
    assert run(code + LOAD.format(folder=folder, options=""), tmp_path) == "moesaic.nn.modeling_moesaic"


def test_transformers_before_moesaic(folder: str, tmp_path: Path) -> None:
    code = "from transformers import AutoModelForCausalLM; import moesaic\n"
    assert run(code + LOAD.format(folder=folder, options=""), tmp_path) == "moesaic.nn.modeling_moesaic"


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
