"""Does a stock folder compute in vLLM what it computes in transformers?

vLLM needs another transformers than we do, so it lives in a virtual environment of its own: its interpreter runs
``vllm_child.py`` (which does not import moesaic) on token windows, one request each, none of which sees another's
cache, and hands back log-probabilities over the whole vocabulary, of the prompt and of the token after it. On a CPU,
vLLM is the package ``vllm-cpu``.

Axes: N windows, W tokens per window, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.evaluate.differences import Differences, join, logit_differences
from moesaic.evaluate.engine_parity import EngineParity
from moesaic.evaluate.fresh_process import answers
from moesaic.targets import TARGETS

PYTHON_VARIABLE = "MOESAIC_VLLM_PYTHON"
_CHILD = Path(__file__).with_name("vllm_child.py")
_VERSION = """
import importlib.metadata as metadata, importlib.util as util
names = metadata.packages_distributions().get("vllm", [])
print(metadata.version(names[0]) if names and util.find_spec("vllm") else "")
"""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with ours
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads may move: cores can be shared
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of all memory
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # a few small functions, which would ask for a C++ compiler and half a minute
}


def find_python(explicit: str | Path | None = None) -> Path | None:
    """The interpreter that has vLLM: ``explicit``, or that of MOESAIC_VLLM_PYTHON, or this one; None without any.

    Raises InputError when the interpreter that was asked for does not exist.
    """
    named = explicit or os.environ.get(PYTHON_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise InputError(f"{path} is no Python interpreter", f"see --vllm-python and {PYTHON_VARIABLE}")
        return path
    return Path(sys.executable) if importlib.util.find_spec("vllm") else None


def vllm_version(python: Path) -> str:
    """Version of vLLM there. Raises InputError when it has none."""
    done = subprocess.run([python, "-I", "-c", _VERSION], capture_output=True, text=True, check=False)
    version = done.stdout.strip()
    if done.returncode or not version:
        raise InputError(f"{python} has no vLLM", "install vllm-cpu in a virtual environment of its own")
    return version


def otherwise_in_vllm(stock: Checkpoint) -> str | None:
    """Why vLLM computes something else from a stock folder, mostly without complaint, or None."""
    config = stock.config
    model_type = str(config.get("model_type"))
    if model_type not in TARGETS:
        return None
    gaps = TARGETS[model_type].vllm
    if gaps.unties and config.get("tie_word_embeddings"):
        return f"its {model_type} overlooks tied embeddings: lm_head must be written"
    if gaps.asks_qkv_bias and not any(name.endswith("q_proj.bias") for name in stock.names):
        return f"its {model_type} always has biases on query, key and value: they must be written, zeros if need be"
    unread = tuple(f".{projection}.bias" for projection in gaps.unread_biases)
    for name in stock.names:
        if unread and name.endswith(unread) and bool(stock.tensor(name).any()):
            return f"its {model_type} does not read {name}"
    natural = config["hidden_size"] // config["num_attention_heads"]
    if gaps.natural_heads and config.get("head_dim") not in (None, natural):
        return f"its {model_type} takes hidden_size / heads for head_dim"
    return None


def vllm_parity(
    folder: Path, ids_NW: Tensor, reference: Callable[[Tensor], Tensor], *, python: Path | None = None
) -> EngineParity:
    """Compare a stock folder in vLLM, in fp32, with ``reference``, which maps ids_W to logits_WV.

    Args:
        folder: The stock folder.
        ids_NW: Token ids, judged window by window; W must be below the model's context, as vLLM adds a token.
        reference: As :func:`moesaic.evaluate.llama_cpp.stock_logits` makes it.
        python: The interpreter that has vLLM; :func:`find_python` by default.

    Raises:
        InputError: no interpreter has vLLM.
        VerificationError: vLLM does not load or run the folder.
    """
    python = _python(python)
    found = vllm_differences(folder, ids_NW, reference, python=python)
    vocabulary = int(Checkpoint(folder).config["vocab_size"])
    engine = f"vLLM {vllm_version(python)}"
    return EngineParity.of(found, engine=engine, candidates=vocabulary, windows=len(ids_NW))


def vllm_differences(
    folder: Path, ids_NW: Tensor, reference: Callable[[Tensor], Tensor], *, python: Path | None = None
) -> Differences:
    """:func:`vllm_parity` token by token: of log-probabilities over the whole vocabulary."""
    command = [str(_python(python)), "-I", str(_CHILD)]
    windows = answers(command, folder, ids_NW, engine="vLLM", environment=_ENVIRONMENT)
    return join(
        [
            logit_differences(reference(ids_W).double().log_softmax(-1), window["logprobs"].double())
            for ids_W, window in zip(ids_NW, windows, strict=True)
        ]
    )


def _python(python: Path | None) -> Path:
    found = python or find_python()
    if found is None:
        raise InputError("vLLM is not installed here", f"name the interpreter that has it in {PYTHON_VARIABLE}")
    return found
