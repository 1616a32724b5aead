"""``bench``: a converted model beside the dense one, every figure of the same turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.evaluate.llama_cpp import available
from tests.targets.helpers import plans_for, write, write_gguf
from tests.tiny_models import build_tiny


def said(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moesaic", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


@pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
def test_rows_of_both_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = build_tiny("llama", tmp_path / "dense")
    plans = plans_for(dense)
    own, stock = (write(dense, plans, tmp_path / name, name) for name in ("moesaic", "glm4_moe"))
    files = [str(write_gguf(folder, tmp_path / f"{folder.name}.gguf", "f16").output) for folder in (dense, stock)]
    small = ["--prompt", "8", "--steps", "3", "--rounds", "2", "--batch", "1", "--batch", "2", "--threads", "1"]
    ggufs = ["--baseline-gguf", files[0], "--gguf", files[1]]
    asked = ["bench", str(own), "--baseline", str(dense), *small, *ggufs]
    code, out, err = said([*asked, "--json"], monkeypatch, capsys)
    assert code == 0
    assert "transformers, 2 at a time: about" in err
    engines = json.loads(out)["engines"]
    rows = engines["transformers"] + engines["llama.cpp"]
    assert [(row["model"], row["batch"]) for row in engines["transformers"]] == [
        ("dense", 1),
        ("converted", 1),
        ("dense", 2),
        ("converted", 2),
    ]
    for row in rows:
        for part in ("prefill", "decode"):
            figures = row[part]
            assert figures["best"] >= figures["median"] > 0
            dense_row = next(r for r in rows if (r["batch"], r["model"]) == (row["batch"], "dense"))
            if row in engines["transformers"]:
                times = figures["best"] / dense_row[part]["best"]
                assert figures["times_dense"][0] == pytest.approx(times, rel=0.02)
    assert engines["llama.cpp"][1]["megabytes"] == round(Path(files[1]).stat().st_size / 1e6, 1)


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(build_tiny("llama", tmp_path / "dense"))
    for more, reason in [
        (["--gguf", "x.gguf"], "llama.cpp compares two files"),
        (["--gguf", "x.gguf", "--baseline-gguf", "y.gguf"], "x.gguf does not exist"),
        (["--dtype", "int4"], "unknown --dtype"),
        (["--rounds", "0"], "at least 1"),
    ]:
        code, _, err = said(["bench", dense, "--baseline", dense, *more], monkeypatch, capsys)
        assert (code, err.count("error:")) == (1, 1)
        assert reason in err
