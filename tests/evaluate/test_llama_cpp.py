"""llama.cpp as an engine to compare with: every window is a text of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.evaluate.differences import join
from moesaic.evaluate.llama_cpp import available, llama_cpp_differences, llama_cpp_parity, stock_logits
from tests.targets.helpers import plans_for, write, write_gguf

pytestmark = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")


@pytest.mark.parametrize("reuse", [True, False])
def test_windows_do_not_share_a_context(reuse: bool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "moe", "glm4_moe")
    file = write_gguf(folder, tmp_path / "model.gguf", "f32").output
    ids_NW = torch.randint(4, 290, (4, 12), generator=torch.Generator().manual_seed(0))
    ids_NW[1, :8] = ids_NW[0, :8]  # the second goes on as the first begins
    ids_NW[3] = ids_NW[0]
    reference = stock_logits(folder)
    alone = join([llama_cpp_differences(file, ids_W[None], reference, reuse=reuse) for ids_W in ids_NW])
    together = llama_cpp_differences(file, ids_NW, reference, reuse=reuse)
    assert torch.equal(together.delta_T, alone.delta_T)
    assert torch.equal(together.kl_T, alone.kl_T)
    parity = llama_cpp_parity(file, ids_NW, reference, reuse=reuse)
    assert (parity.windows, parity.tokens) == (4, 48)
    assert parity.max_delta < 5e-5
    # The model does look back: what it says of the same token differs from window to window.
    lone_V, late_V = reference(ids_NW[0, 5:6])[0], reference(ids_NW[0])[5]
    assert (lone_V - late_V).abs().max() > 0.1
