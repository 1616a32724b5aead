"""The page of families is what the tables say, and knows every model type of the transformers at hand."""

from __future__ import annotations

from benchmarks.families_page import PAGE, page, unknown

from moesaic.anatomy import FAMILIES
from moesaic.anatomy.others import KINDS


def test_every_model_type_of_transformers_is_a_family_or_refused_with_a_reason() -> None:
    assert unknown() == []


def test_no_model_type_stands_twice() -> None:
    named = [name for kind in KINDS for name in sorted(kind.model_types)]
    assert sorted({*named}) == sorted(named)
    assert not FAMILIES.keys() & set(named)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.families_page"
