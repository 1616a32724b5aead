"""How long the sentences of pages are: words in the mean and at most.

Tables, code, headings and links' targets are left out. An item of a list ends a sentence too.

    python docs/readability.py README.md --mean 16 --longest 30
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from statistics import fmean

_FENCE = re.compile(r"^```.*?^```\s*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])\**\s+(?=[\"'`*(A-Z0-9])")
_WORD = re.compile(r"[A-Za-z0-9][\w'%./=-]*")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose."""
    text = _FENCE.sub("\n\n", markdown)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        plain = line.strip()
        if not plain or plain.startswith(("|", "#", "![", "<")) or line.startswith("    "):
            paragraphs.append([])
            continue
        if re.match(r"([*+-]|\d+\.) ", plain):
            paragraphs.append([])
            plain = plain.partition(" ")[2]
        paragraphs[-1].append(plain)
    joined = [_LINK.sub(r"\1", " ".join(lines)) for lines in paragraphs if lines]
    found = [re.sub(r"`[^`]*`", "code", each) for each in joined]
    return [sentence for paragraph in found for sentence in _END.split(paragraph) if _WORD.search(sentence)]


def words(sentence: str) -> int:
    """Words of a sentence; a piece of code counts as one."""
    return len(_WORD.findall(sentence))


def main(arguments: list[str] | None = None) -> int:
    """Print a line per page; 1 where a page has longer sentences than asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--mean", type=float, default=float("inf"), help="most words in the mean")
    parser.add_argument("--longest", type=int, default=10**6, help="most words of a sentence")
    args = parser.parse_args(arguments)
    failed = False
    for page in args.pages:
        found = sentences(page.read_text(encoding="utf-8"))
        counts = [words(sentence) for sentence in found] or [0]
        print(f"{page}: {len(found)} sentences, mean {fmean(counts):.1f} words, longest {max(counts)}")
        failed |= fmean(counts) > args.mean
        for sentence, count in zip(found, counts, strict=False):
            if count > args.longest:
                failed = True
                print(f"  {count}: {sentence}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
