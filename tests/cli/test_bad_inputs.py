"""Bad input of every kind: one clear line and a hint, the right exit code, at once, and nothing is written."""

from __future__ import annotations

import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.errors import InputError, MoesaicError
from moesaic.jobs.plan import plan
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from tests.cli import bad_evaluation, bad_folders, bad_inputs, bad_options, bad_splits, bad_training
from tests.cli.bad_inputs import Bad
from tests.tiny_models import build_tiny

TABLES = (bad_inputs, bad_options, bad_folders, bad_splits, bad_evaluation, bad_training)
TABLE = [bad for table in TABLES for bad in table.TABLE]
SECONDS = 1.0
LONGEST_LINE = 200
USAGE = "Error: "  # how typer begins the last line of a usage error


@pytest.fixture(scope="module")
def intact(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by family, and two outputs of the Llama; also imports all that the commands import."""
    import pyarrow.parquet  # noqa: F401

    import moesaic.jobs.evaluate
    import moesaic.jobs.undo
    import moesaic.jobs.verify  # noqa: F401
    from moesaic.jobs.convert import convert

    root = tmp_path_factory.mktemp("intact")
    folders = {family: tiny(family) for family in ("llama", "gpt2", "mixtral")}
    folders["llama-40"] = build_tiny("llama", root / "llama-40", d_ff=40)
    options = {"done": {"branches": 4}, "pruned": {"branches": 4, "keep": 2, "prune_factor": "none"}}
    for name, chosen in options.items():
        folders[name] = convert(tiny("llama"), root / name, method="mlpmoe", options=chosen).output
    return folders


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the cache of dequantised models beside it."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``moesaic COMMAND``, in this process."""
    monkeypatch.setattr(sys, "argv", ["moesaic", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with the files' content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_error(stderr: str, message: str, hint: str, place: Path) -> None:
    """The whole of stderr is one line of error and at most one of hint, and both say what is expected."""
    lines = stderr.replace(f"{place}/", "").splitlines()
    assert len(lines) == (2 if hint else 1), stderr
    assert lines[0].startswith("error: ")
    assert "internal error" not in lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert all(len(line) <= LONGEST_LINE for line in lines), stderr
    if hint:
        assert lines[1].startswith("hint: ")
        assert re.search(hint, lines[1].removeprefix("hint: ")), lines[1]


def test_table_is_large_and_its_names_are_unique() -> None:
    assert len({bad.name for bad in TABLE}) == len(TABLE) >= 45


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input(
    bad: Bad,
    intact: dict[str, Path],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, source in {"model": intact[bad.family], "done": intact["done"], "pruned": intact["pruned"]}.items():
        shutil.copytree(source, work / name)
    bad.arrange(work)
    before = tree(work.parent)
    started = time.process_time()
    code = run(bad.command, monkeypatch)
    spent = time.process_time() - started
    printed = capsys.readouterr()
    assert code == bad.code, printed.err
    if bad.code == 2:
        assert re.search(bad.message, printed.err.splitlines()[-1])
        assert printed.err.splitlines()[-1].startswith(USAGE)
    else:
        check_error(printed.err, bad.message, bad.hint, work)
    assert "Traceback" not in printed.err
    assert not printed.out
    after = tree(work.parent)
    after.pop("cache", None)
    assert after == before
    assert spent < SECONDS


HEADERS = [bad for bad in (*bad_inputs.MODELS, bad_inputs.CALIBRATION[0]) if bad.name != "no weights"]
"""Of a folder without weights, `plan` forecasts by config.json alone."""


@pytest.mark.parametrize("bad", HEADERS, ids=lambda bad: bad.name)
def test_plan_refuses_what_convert_refuses_by_headers(bad: Bad, intact: dict[str, Path], work: Path) -> None:
    for name, source in {"model": intact[bad.family], "done": intact["done"]}.items():
        shutil.copytree(source, work / name)
    bad.arrange(work)
    words = shlex.split(bad.command)
    method = "mlpmoe" if "mlpmoe" in words else "cmoe"
    settings = ConvertSettings(method=method, hierarchical="--hierarchical" in words)
    try:
        check_request(words[1], settings)
    except MoesaicError:
        with pytest.raises(MoesaicError):
            plan(words[1], settings)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond a kilobyte, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(
    intact: dict[str, Path],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_files: None,
) -> None:
    code = run(f"convert {intact['llama']} out --method mlpmoe --set branches=4 --quiet", monkeypatch)
    assert code == 4
    check_error(capsys.readouterr().err, "cannot write .*File too large", "ulimit.*resumes", work)
    assert not (work / "out").exists()


def test_debug_shows_the_trace(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moesaic", "convert", "nowhere/at/all", "out", "--debug"])
    with pytest.raises(InputError, match="no model at"):
        main()


_COLD = """
import sys, atexit
from moesaic.cli.main import main
atexit.register(lambda: print([name for name in ("torch", "transformers") if name in sys.modules]))
main()
"""


def cold(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``moesaic ARGUMENTS`` in a process of its own; stdout ends with the heavy libraries that it imported."""
    return subprocess.run(
        [sys.executable, "-c", _COLD, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "nowhere/at/all", "out"), 1, "no model at"),
        (("convert", "model", "out", "--layout", "3of8"), 1, "cannot read layout"),
        (("convert", "model", "out", "--layout", "S1A1E64"), 1, "only 37 neurons"),
        (("convert", "model", "out", "--method", "cmoo"), 1, "unknown method"),
        (("convert", "model", "model/out"), 1, "inside the model"),
        (("convert", "model", "out", "--layuot"), 2, "No such option"),
    ],
)
def test_a_slip_is_answered_before_torch_is_imported(
    tiny: Callable[[str], Path], work: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    shutil.copytree(tiny("llama"), work / "model")
    done = cold(*arguments, cwd=work)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines() == ["[]"]


def test_libraries_keep_quiet(intact: dict[str, Path], work: Path) -> None:
    """What transformers says when it loads weights (bars, tied weights, reports) does not stand between our lines."""
    (work / "t.txt").write_text("There are the weights of the other experts, which rest. " * 16)
    done = cold("eval", str(intact["done"]), "--text", "t.txt", "--window", "64", "--quiet", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
