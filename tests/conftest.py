"""Fixtures for all tests. No test goes to the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny_models import build_tiny

REAL_MODEL_VARIABLE = "MOESAIC_SMOLLM2"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the tests out of the user's cache of dequantised models."""
    os.environ["MOESAIC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
    """SmolLM2-135M as a folder, for tests marked ``real``."""
    folder = os.environ.get(REAL_MODEL_VARIABLE)
    if folder is None or not (Path(folder) / "config.json").exists():
        pytest.skip(f"{REAL_MODEL_VARIABLE} does not name a model folder")
    return Path(folder)
