"""What is built holds all that runs, and nothing else; `make package` installs and runs it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import moesaic

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "moesaic"
MISSING = [name for name in ("hatchling", "hatch_vcs") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (they are in moesaic[dev])")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, timeout=120)
    return folder


def sources() -> set[str]:
    """Files of the package, as they are named in it."""
    return {
        f"moesaic/{file.relative_to(SOURCE).as_posix()}"
        for file in SOURCE.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_is_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert {"moesaic/report/page.css", "moesaic/data/sample.txt", "moesaic/py.typed"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {"gguf", "report", "tune", "docs", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    heavy = re.compile(r"^(matplotlib|zensical|gguf|pytest|peft)\b(?!.*extra ==)")
    assert [need for need in metadata.get_all("Requires-Dist", []) if heavy.match(need)] == []


def test_the_sdist_builds_without_git(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert not (folder / "tests").exists()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(build, cwd=folder, check=True, timeout=120)
    (again,), (first,) = (tmp_path / "again").glob("*.whl"), dist.glob("*.whl")
    assert again.name == first.name, "the same version, from PKG-INFO"


def test_a_tree_without_git_and_tags_has_a_version(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "src" / "moesaic").mkdir(parents=True)
    (tmp_path / "src" / "moesaic" / "__init__.py").touch()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=120)
    assert [file.name for file in (tmp_path / "dist").iterdir()] == ["moesaic-0.1.0.dev0-py3-none-any.whl"]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert re.match(r"\d+\.\d+", moesaic.__version__)
