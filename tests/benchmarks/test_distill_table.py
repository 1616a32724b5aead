"""The page of several sweeps: mixtures stand beside their own twins, and no path of a machine gets into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.distill_table import gather, page


def student(law: str, experts: int, active: int, fvu: float, gain: float | None = None) -> dict[str, Any]:
    spec = {"experts": experts, "router": "full", "rank": 0, "shared": active // 2}
    row = {"law": law, "spec": spec, "active": active, "fvu": fvu, "router_macs": 3 * active, "neuron_macs": 2 * active}
    return row | {"parameters": 1000, "gain": gain, "equal_macs": None}


def sweep(folder: Path) -> Path:
    mixtures = [student("real", 99, 64, 0.25, 2.5), student("gaussian", 99, 64, 0.5), student("real", 77, 64, 0.75, 1)]
    dense = [student(law, 0, width, 1 / width) for law in ("real", "gaussian") for width in (16, 32)]
    baseline = {"affine": {"fvu": 0.625}, "top_k_oracle": {"16": 0.5}, "input_pca_floor": {"8": 0.75}}
    config = {
        "epochs": 2,
        "batch": 10,
        "rates": [0.01],
        "max_norm": 20.0,
        "dense_widths": [16, 32],
        "laws": ["real", "gaussian"],
        "probe": {"atoms": 2},
    }
    results = {
        "model": str(folder / "models" / "some-model"),
        "layer": 3,
        "site": "layers.3.mlp",
        "d_model": 8,
        "d_ff": 16,
        "config": config | {"data": {"sources": [{"name": str(folder / "text.txt"), "weight": 1.0}]}},
        "data": {"tokens": {"train": 105, "test": 9}, "left_out": 3, "left_out_energy": 0.5},
        "baselines": {"real": baseline, "gaussian": baseline},
        "students": dense + mixtures,
        "probe": [{"law": "gaussian", "top_k": 8, "fvu": 0.375}],
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_a_mixture_stands_beside_its_own_twin(tmp_path: Path) -> None:
    lines = page(gather([sweep(tmp_path)])).splitlines()
    first, second = (line for line in lines if "m = " in line and line.startswith("|"))
    assert "| 64 | 0.250 | 2.50x | 0.500 | outside | outside | 1.5 |" in first
    assert "| 0.750 | 1.00x |  |  |" in second, "no twin was trained of it"
    assert any("20 steps of 10" in line and "3 tokens of more than 20 median" in line for line in lines)
    assert any(line.startswith("| some-model layer 3 | real | 0.062 | 0.031 | 0.625 |") for line in lines)


def test_dictionaries_stand_beside_principal_directions(tmp_path: Path) -> None:
    other = gather([sweep(tmp_path)])
    lines = page([], other).splitlines()
    assert "| some-model layer 3, 2 d atoms | gaussian | 0.375 (0.750) |" in lines
    assert not any("m = " in line for line in lines), "students of such sweeps are not shown"


def test_no_paths(tmp_path: Path) -> None:
    sweeps = gather([sweep(tmp_path)])
    assert str(tmp_path) not in json.dumps(sweeps) + page(sweeps)
