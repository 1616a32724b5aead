"""Exported folders in an environment that has transformers and torch but no moesaic: they load and generate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.nn.register import register
from tests.targets.helpers import plans_for, write

Tiny = Callable[[str], Path]

GENERATE = """
import importlib.abc, sys

class NoMoesaic(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moesaic":
            raise ModuleNotFoundError("no module named " + name, name=name)

sys.meta_path.insert(0, NoMoesaic())
try:
    import moesaic
except ModuleNotFoundError:
    pass
else:
    sys.exit("moesaic can be imported: this is no fresh environment")
import torch
import transformers
from transformers import AutoTokenizer

folder, trust = sys.argv[1], sys.argv[2] == "trust"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
model = getattr(transformers, sys.argv[3]).from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
ids = tokenizer("The expert that reads", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
assert out.shape[1] == ids["input_ids"].shape[1] + 4
assert not any(name == "moesaic" or name.startswith("moesaic.") for name in sys.modules)
print(type(model).__name__, out[0].tolist())
"""


def generate(
    folder: Path, trust: bool, modules: Path, auto: str = "AutoModelForCausalLM"
) -> subprocess.CompletedProcess[str]:
    """In a process that cannot import moesaic, and with a cache of remote code of its own. ``auto``: what loads it."""
    command = [sys.executable, "-I", "-c", GENERATE, str(folder), "trust" if trust else "no", auto]
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("target", "trust", "kind"),
    [("glm4_moe", False, "Glm4MoeForCausalLM"), ("moesaic", True, "MoesaicForCausalLM")],
)
def test_a_folder_generates_without_moesaic(target: str, trust: bool, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "out", target)
    done = generate(folder, trust, tmp_path / "modules")
    assert done.returncode == 0, done.stderr[-2000:]
    name, _, ids = done.stdout.strip().splitlines()[-1].partition(" ")
    assert name == kind
    register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("The expert that reads", return_tensors="pt")
    here = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids == str(here[0].tolist())


def test_the_moesaic_architecture_is_unknown_without_remote_code(tiny: Tiny, tmp_path: Path) -> None:
    folder = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "out", "moesaic")
    done = generate(folder, False, tmp_path / "modules")
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr
