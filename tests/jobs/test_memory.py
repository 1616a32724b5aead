"""Bounded memory: sizes as people write them, early refusals, buffers in files that change no decision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moesaic
import moesaic.methods
from moesaic.anatomy import read_anatomy
from moesaic.calibration import stream as streams
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.options.memory import SPILL_BYTES, parse_bytes, spill_bytes
from tests.methods.test_contract import ROWS

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "found"), [("8GB", 8e9), ("1.5 GiB", 1.5 * 2**30), ("500m", 5e8), ("2048", 2048), (".5kb", 500)]
)
def test_sizes_as_people_write_them(text: str, found: float) -> None:
    assert parse_bytes(text) == found


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "8 PB", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^cannot read the size "):
        parse_bytes(text)


def test_a_conversion_that_does_not_fit_is_refused_before_work(tiny: Tiny, tmp_path: Path) -> None:
    forecast = moesaic.plan(tiny("llama"), method="static")
    with pytest.raises(ResourceError, match=r"^the conversion takes about 0.5 GB of memory, 0.1 GB are allowed"):
        moesaic.convert(tiny("llama"), tmp_path / "out", method="static", memory="100MB")
    assert list(tmp_path.iterdir()) == []
    assert 0.1e9 < forecast.peak_bytes < 0.6e9
    assert any("too little" in remark for remark in moesaic.plan(tiny("llama"), memory="100MB").remarks)


def test_less_memory_sends_smaller_buffers_to_files() -> None:
    assert spill_bytes(None) == spill_bytes(10**12) == SPILL_BYTES
    assert spill_bytes(16 * 10**6) == 10**6


@pytest.mark.parametrize("name", ["cmoe", "static", "token_clusters, union", "token_clusters"])
def test_buffers_in_files_change_no_decision(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, checkpoint = ROWS[name], Checkpoint(tiny("llama"))
    anatomy = read_anatomy(checkpoint.config)
    ids_NW = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    made, mapped = [], []
    map_it = streams._mapped

    def counted(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        mapped.append(shape)
        return map_it(folder, shape, dtype, nbytes)

    monkeypatch.setattr(streams, "_mapped", counted)
    for limit in (SPILL_BYTES, 0):
        stream = LayerStream(checkpoint, anatomy, ids_NW, spill=tmp_path, spill_bytes=limit)
        path = anatomy.sites[0].path
        plan = moesaic.methods.get_method(row.method).plan_site(  # type: ignore[union-attr]
            stream.stored_weights(path), stream.capture()[path], row.config(), 0
        )
        made.append(plan.tensors())
    wide = (128, anatomy.sites[0].d_ff)
    assert (wide in mapped) == name.startswith("token_clusters")
    assert mapped
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
