"""Files that a forge reads: they parse, and name commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_run_what_the_makefile_has(name: str) -> None:
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    wanted = {target for command in commands for target in re.findall(r"^make ([a-z-]+)", command)}
    assert wanted
    assert wanted <= TARGETS


def test_issue_forms_have_what_a_forge_needs() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[bm]*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_has_the_required_keys() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
