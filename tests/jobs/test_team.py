"""Two gloo processes decide what one decides, byte for byte; what cannot be shared is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.errors import InputError
from moesaic.solvers.team import Team
from moesaic.staging.manifest import MANIFEST_NAME, UNHASHED
from tests.jobs.team_worker import CASES, run
from tests.tiny_models import build_tiny
from tests.train.processes import start_two, two_processes

WORKER = "tests.jobs.team_worker"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have it: sums of several threads have another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that hold timings."""
    left_out = UNHASHED - {MANIFEST_NAME}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in left_out}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_what_one_writes(case: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("qwen2_moe" if "hierarchical" in CASES[case] else "llama")
    run(str(source), str(tmp_path / "one"), case)
    two_processes(WORKER, {}, source, tmp_path / "two", case)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_leaves_nothing_and_the_same_command_goes_on(processes: int, tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    run(str(source), str(tmp_path / "whole"), "union")
    out = tmp_path / "out"
    first, second = start_two(WORKER, {}, source, out, "union", 1)
    assert first.wait(timeout=240) == 9
    second.kill()
    second.communicate()
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    if processes == 1:
        run(str(source), str(out), "union")
    else:
        two_processes(WORKER, {}, source, out, "union")
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_be_shared_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no text is read, so there is nothing that 3 processes could share"):
        moesaic.convert(tiny("llama"), out, method="mlpmoe")
    calibration = {"tokens": 64, "window": 32}
    with pytest.raises(InputError, match="2 calibration windows cannot be shared by 3 processes"):
        moesaic.convert(tiny("llama"), out, method="cmoe", options={"layout": "S2A2E7"}, calibration=calibration)
    assert not out.exists()


@pytest.mark.parametrize(("count", "block"), [(0, 1), (5, 1), (1536, 512), (1537, 512), (7, 512)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_are_whole_blocks_and_all_of_them(count: int, block: int, size: int) -> None:
    parts = [Team(rank, size).part(count, block) for rank in range(size)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
    assert all(part.start % block == 0 or part.start == count for part in parts)
    blocks = [-(-(part.stop - part.start) // block) for part in parts]
    assert max(blocks) - min(blocks) <= 1
