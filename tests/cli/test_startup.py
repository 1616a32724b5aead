"""The command line answers at once: no torch where none is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic

_GUARD = """
import sys
from moesaic.cli.main import main
sys.argv = ["moesaic", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
else:
    code = 0
heavy = [name for name in ("torch", "transformers", "numpy", "scipy", "ortools", "matplotlib") if name in sys.modules]
print("HEAVY", heavy)
sys.exit(code)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _GUARD, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("convert", "--help"),
        ("methods",),
        ("methods", "cmoe"),
        ("eval", "--help"),
        ("distill", "--help"),
        ("targets",),
        ("presets",),
        ("chat", "--help"),
    ],
)
def test_help_and_lists_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_the_version_is_one_line() -> None:
    assert run("--version").stdout.splitlines()[0] == f"moesaic {moesaic.__version__}"


def test_plan_imports_nothing_heavy(tiny: Callable[[str], Path]) -> None:
    done = run("plan", str(tiny("llama")), "--layout", "S3A3E8")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "5 routed experts of 5 neurons; a token uses 3" in done.stdout


@pytest.mark.parametrize(
    "slip", [("--calib", "nowhere.txt"), ("--target", "gguf2"), ("--router", "best"), ("--layout", "S3A3")]
)
def test_slips_of_a_conversion_are_answered_before_anything_heavy(
    slip: tuple[str, ...], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run("convert", str(tiny("llama")), str(tmp_path / "out"), *slip)
    assert done.returncode == 1
    assert "HEAVY []" in done.stdout
    assert slip[1] in done.stderr or "router.mode" in done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, moesaic; print([n for n in ('torch', 'transformers', 'numpy', 'pydantic') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_stay_callable_after_their_modules_are_imported() -> None:
    code = (
        "import moesaic, moesaic.jobs.convert, moesaic.jobs.plan\n"
        "print(all(callable(getattr(moesaic, n)) for n in moesaic.__all__ for _ in range(2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_usage_errors_exit_with_two() -> None:
    assert run("convert", "--no-such-option").returncode == 2
    assert run("no-such-verb").returncode == 2
