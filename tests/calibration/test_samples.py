"""The shipped texts: there, in bounds, and calibration apart from evaluation."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from moesaic.calibration.samples import MIX, SAMPLES, evaluation_text, sample_text


def test_evaluation_text_is_the_usual_wikitext2_raw_test_split() -> None:
    text = evaluation_text()
    assert len(text.encode()) == 1_296_370
    assert "\r" not in text
    # 4358 rows joined by blank lines, of which the 2891 that are not empty end in a newline themselves.
    assert text.count("\n") == 2 * 4357 + 2891
    assert text.startswith("\n\n = Robert Boulter = \n")


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_have_text_and_nothing_in_common_with_the_evaluation_text(name: str) -> None:
    text = sample_text(name)
    assert len(text) > 50_000
    assert "<|endoftext|>" not in text
    assert not _runs_of_ten_words(text) & _runs_of_ten_words(evaluation_text())


def test_package_data_is_small_and_every_file_has_its_licence_noted() -> None:
    data = files("moesaic") / "data"
    notes = (data / "calibration" / "LICENSES.md").read_text(encoding="utf-8")
    shipped = [file for name in ("calibration", "eval") for file in (data / name).iterdir()]
    assert sum(len(file.read_bytes()) for file in shipped) < 1_500_000
    assert all(file.name in notes for file in shipped if file.name != "LICENSES.md")


def test_mix_consists_of_samples_and_other_names_are_refused() -> None:
    assert MIX.keys() <= SAMPLES.keys()
    with pytest.raises(KeyError):
        sample_text("../eval/wikitext2_raw_test.txt.gz")


def _runs_of_ten_words(text: str) -> set[int]:
    words = re.sub(r"[^a-z0-9]+", " ", text.lower().replace("<unk>", "")).split()
    return {hash(tuple(words[i : i + 10])) for i in range(len(words) - 9)}
