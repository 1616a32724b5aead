"""The texts that ship with moesaic, so that it works offline: calibration samples, and apart the evaluation text.

Origin, licences and what was changed: ``data/calibration/LICENSES.md`` in the package.
"""

from __future__ import annotations

import gzip
from importlib.resources import files

SAMPLES: dict[str, str] = {
    "wikitext": "WikiText-2 validation articles, tokenised words with <unk>, as in the papers' calibration (370 KB)",
    "c4": "web pages from C4 (150 KB)",
    "code": "CUDA, C++, Python, JavaScript and Markdown of three projects (90 KB)",
    "wiki": "Wikipedia articles as plain text (150 KB)",
    "tiny": "TinyStories, short stories in simple words (150 KB)",
}
"""Built-in calibration samples: name -> what it is. None overlaps the evaluation text."""

MIX: dict[str, float] = {"wikitext": 2.0, "c4": 1.0, "code": 1.0}
"""What the source ``mix`` stands for: half encyclopedia, a quarter web pages, a quarter source code."""


def sample_text(name: str) -> str:
    """The built-in calibration sample ``name``, a key of ``SAMPLES``. Raises KeyError for another name."""
    if name not in SAMPLES:
        raise KeyError(name)
    return (files("moesaic") / "data" / "calibration" / f"{name}.txt").read_bytes().decode("utf-8")


def evaluation_text() -> str:
    """The test split of WikiText-2 raw as one text: rows joined by blank lines, LF line ends, 1,296,370 bytes in UTF-8.

    For evaluation only; nothing in calibration reads it.
    """
    packed = (files("moesaic") / "data" / "eval" / "wikitext2_raw_test.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")
