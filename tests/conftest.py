"""Fixtures for all tests. No test goes to the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from moesaic.errors import InputError
from moesaic.jobs.demo import packaged_model
from moesaic.paths import cache_folder
from tests.tiny_models import build_tiny

_USER_CACHE = cache_folder()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests out of the user's cache. All workers share one, so that a kernel is compiled once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["MOESAIC_CACHE"] = str(shared / "cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny("llama")``: the folder of a tiny checkpoint, built once per session. Copy it before changing it."""
    built: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in built:
            built[family] = build_tiny(family, tmp_path_factory.mktemp(family) / "model")
        return built[family]

    return folder_of


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16 for tests marked ``real``: made once, in the cache that ``moesaic demo`` uses."""
    _USER_CACHE.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, FileLock(_USER_CACHE / ".tests.lock"):
        patch.setenv("MOESAIC_CACHE", str(_USER_CACHE))
        try:
            return packaged_model()
        except InputError as missing:
            pytest.fail(f"{missing}; or leave these tests out: -m 'not real'")
