"""The staged writer under crashes at every file-system operation, full disks, and a second process."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesaic import durable
from moesaic.errors import InputError, ResourceError
from moesaic.staging.writer import LOCK_NAME, StagedOutput
from tests.in_memory import memory_folder
from tests.staging.staged_job import KEY, PLAN, SHARDS, STEPS, job, tree


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def complete(fast_dir: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    job(fast_dir / "reference")
    return tree(fast_dir / "reference")


_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile"}
_WRITING = os.O_WRONLY | os.O_RDWR


def crash_at(number: int, action: Callable[[], object]) -> None:
    """Run ``action`` and die, as in a power cut, at file-system operation ``number``; half of what is unsynced is lost.

    Operations are counted where they reach the system: audit events for names, ``os.fsync`` before and after, and the
    file writer of safetensors. Must run in a forked child: an audit hook stays.
    """
    count = 0
    synced: dict[int, int] = {}
    real_fsync, real_save = os.fsync, save_file

    def tick(before_death: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == number:
            before_death()
            os._exit(9)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if event in _EVENTS or writes:
            tick()

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)

        def lose_half() -> None:
            if stat.S_ISREG(status.st_mode):
                safe = min(synced.get(status.st_ino, 0), status.st_size)
                os.truncate(f"/proc/self/fd/{descriptor}", safe + (status.st_size - safe) // 2)

        tick(lose_half)
        real_fsync(descriptor)
        synced[status.st_ino] = status.st_size
        tick()

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        tick(lambda: path.write_bytes(b"\x10"))
        real_save(tensors, path, metadata=metadata)
        tick(lambda: os.truncate(path, path.stat().st_size // 2))

    os.fsync = fsync
    durable.save_file = save  # type: ignore[assignment]
    sys.addaudithook(hook)
    action()
    os._exit(0)


def in_child(action: Callable[[Callable[[str], object]], object]) -> tuple[int, list[str]]:
    """Fork, run ``action``, which is given a function to report a finished step; returns exit code and reports."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            action(lambda step: os.write(writer, f"{step}\n".encode()))
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as reports:
        steps = reports.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), steps


def crash_job(out: Path, number: int) -> tuple[int, list[str]]:
    return in_child(lambda report: crash_at(number, lambda: job(out, report)))


forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@forks
def test_crash_at_every_operation_resumes_to_equal_bytes(fast_dir: Path, complete: dict[str, bytes]) -> None:
    out, partial = fast_dir / "out", fast_dir / "out.partial"
    number, appeared = 0, 0
    while True:
        number += 1
        code, finished = crash_job(out, number)
        if code == 0:
            break
        assert code == 9
        if out.exists():
            appeared += 1
            if appeared == 1:  # what is left of the staging folder does not stand in the way of another conversion
                assert partial.exists()
                other = Path(shutil.copytree(partial, fast_dir / "other.partial"))
                assert job(other.with_suffix(""), key={**KEY, "method": "random"}) == list(STEPS)
        else:
            fresh = job(out)
            assert not set(fresh) & set(finished), f"crash at operation {number}: a finished step is done again"
            assert not partial.exists()
        assert tree(out) == complete, f"crash at operation {number}"
        shutil.rmtree(out)
        shutil.rmtree(partial, ignore_errors=True)
    assert number > 100
    assert 0 < appeared < number / 5
    assert tree(out) == complete


@forks
@pytest.mark.parametrize("seed", range(8))
def test_crash_after_crash_still_ends_in_equal_bytes(fast_dir: Path, complete: dict[str, bytes], seed: int) -> None:
    dice, out = random.Random(seed), fast_dir / "out"
    while not out.exists():
        crash_job(out, dice.randint(1, 100))
    assert tree(out) == complete


def suppressed(kind: type[BaseException], action: Callable[[], object]) -> list[BaseException]:
    try:
        action()
    except kind as error:
        return [error]
    return []


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failure_at_every_sync_keeps_what_is_done(
    fast_dir: Path,
    complete: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[BaseException],
) -> None:
    real_fsync, out = os.fsync, fast_dir / "out"
    for number in range(1, 1000):
        calls = 0

        def fsync(descriptor: int, number: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise failure
            real_fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            errors = suppressed(raised, lambda: job(out))
        if calls < number:
            break
        assert [type(error) for error in errors] == [raised]
        assert all("No space left" in str(error) and "it resumes" in str(error) for error in errors if error.args)
        if not out.exists():
            job(out)
        assert tree(out) == complete
        shutil.rmtree(out)
    assert number > 40


@forks
def test_file_size_limit_is_a_resource_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    large = {"w": torch.zeros(300_000)}

    def limited(report: Callable[[str], object]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            with StagedOutput.open(out, KEY) as staged:
                staged.write_shard("layer-00000", SHARDS["layer-00000"])
                staged.write_shard("rest", large)
        except ResourceError as error:
            report(f"{type(error).__name__}:{'resumes' in error.hint}:{'rest' in error.message}")

    assert in_child(limited)[1] == ["ResourceError:True:True"]
    assert not list(tmp_path.rglob("*.tmp"))
    with StagedOutput.open(out, KEY) as staged:
        assert staged.done("layer-00000")
        assert not staged.done("rest")


@forks
def test_second_process_is_refused_and_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ready, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        with StagedOutput.open(out, KEY) as staged:
            staged.write_plans("layer-00000", PLAN)
            staged.write_shard("layer-00000", SHARDS["layer-00000"])
            os.write(ready_write, b"x")
            signal.pause()
        os._exit(1)
    assert os.read(ready, 1) == b"x"
    before = tree(tmp_path)
    with pytest.raises(InputError, match="another process is writing"):
        job(out)
    assert tree(tmp_path) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert job(out) == list(STEPS[1:])


@pytest.mark.parametrize("step", ["plans", "shard", "text", "file"])
def test_a_staging_folder_that_vanishes_is_not_made_again(tmp_path: Path, step: str) -> None:
    """Made again it would have no lock: the next run would take it for somebody else's."""
    out = tmp_path / "out"
    write: dict[str, Callable[[StagedOutput], object]] = {
        "plans": lambda staged: staged.write_plans("layer-00000", PLAN),
        "shard": lambda staged: staged.write_shard("layer-00000", SHARDS["layer-00000"]),
        "text": lambda staged: staged.write_text("config.json", "{}"),
        "file": lambda staged: staged.copy_file(Path(__file__), "extra/code.txt"),
    }
    with StagedOutput.open(out, KEY) as staged:
        shutil.rmtree(staged.root)
        with pytest.raises(ResourceError, match="No such file"):
            write[step](staged)
    assert not list(tmp_path.iterdir())
    assert job(out) == list(STEPS)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, ResourceError), (errno.EROFS, InputError)])
def test_a_disk_that_is_full_at_the_start_is_not_a_wrong_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    real_open = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).endswith(LOCK_NAME):
            raise OSError(code, os.strerror(code))
        return real_open(path, flags, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        with pytest.raises(error, match=os.strerror(code)):
            job(tmp_path / "out")
    assert code != errno.ENOSPC or not list(tmp_path.iterdir())
    assert job(tmp_path / "out") == list(STEPS)
