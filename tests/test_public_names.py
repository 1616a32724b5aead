"""The package's public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moesaic


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in moesaic.__all__:
        assert getattr(moesaic, name) is getattr(moesaic, name)
    assert set(moesaic.__all__) <= set(dir(moesaic))
    assert moesaic.__all__ == sorted(moesaic.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = moesaic.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_export_is_public_and_loaded_on_first_use() -> None:
    code = (
        "import sys, moesaic; before = 'moesaic.jobs.export' in sys.modules; function = moesaic.export\n"
        "from moesaic.jobs.export import export\nprint(before, function is export, moesaic.export is export)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
