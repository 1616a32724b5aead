"""What `export --to gguf` demands of the file: equality where the folder is exact, a bound where eps approaches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.errors import VerificationError
from moesaic.evaluate.engine_parity import EngineParity
from moesaic.evaluate.llama_cpp import available
from moesaic.jobs import native
from moesaic.jobs.export import export
from moesaic.jobs.export_gguf import export_gguf
from tests.targets.helpers import plans_for, write

pytestmark = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
FOUND = EngineParity("llama.cpp", 256, 64, 9.0, 5e-3, 0.9, 5e-3)


@pytest.mark.parametrize(
    ("target", "mean_kl", "passes"),
    [("granitemoeshared", 5e-3, True), ("granitemoeshared", 5e-2, False), ("glm4_moe", 5e-3, False)],
)
def test_bounds_follow_what_the_form_can_give(
    target: str,
    mean_kl: float,
    passes: bool,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "converted", "moesaic")
    folder = export(converted, tmp_path / target, target=target).output
    file = export_gguf(folder, tmp_path / "model.gguf", "f32").output
    right = native.check_gguf(file, folder, "f32")
    assert right is not None
    assert right.max_delta < 1e-4
    monkeypatch.setattr(native, "llama_cpp_parity", lambda *args, **kw: replace(FOUND, mean_kl=mean_kl))
    if passes:
        assert native.check_gguf(file, folder, "f32") is not None
    else:
        with pytest.raises(VerificationError, match=r"llama\.cpp"):
            native.check_gguf(file, folder, "f32")
