"""The page of families is what the tables say, and knows every model type of the transformers at hand."""

from __future__ import annotations

import pytest
from benchmarks.families_page import PAGE, page, unknown

from moesaic.anatomy import FAMILIES
from moesaic.anatomy.others import KINDS


def test_every_model_type_of_transformers_is_a_family_or_refused_with_a_reason() -> None:
    assert unknown() == [], "new in transformers: describe them (CONTRIBUTING.md) or say why not (anatomy/others.py)"


def test_a_new_model_type_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CONFIG_MAPPING, GPT2Config
    from transformers.models.auto import modeling_auto

    with_new = {**modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "gpt2_of_2027": "GPT2LMHeadModel"}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", with_new)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "gpt2_of_2027", GPT2Config)
    assert unknown() == ["gpt2_of_2027"]
    assert "`gpt2_of_2027`: nobody has looked" in page()


def test_no_model_type_stands_twice() -> None:
    named = [name for kind in KINDS for name in sorted(kind.model_types)]
    assert sorted({*named}) == sorted(named)
    assert not FAMILIES.keys() & set(named)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.families_page"
