"""Files of an output that are no longer what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import MoesaicError
from moesaic.staging.manifest import MANIFEST_NAME, load_manifest
from moesaic.staging.results import RESULTS_NAME, read_results


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\x00", "[]"], ids=["nested", "cut", "zero", "list"])
@pytest.mark.parametrize(("name", "read"), [(MANIFEST_NAME, load_manifest), (RESULTS_NAME, read_results)])
def test_a_damaged_file_is_named(name: str, read: Callable[[Path], Any], content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MoesaicError, match=name):
        read(tmp_path)
