"""Bad inputs about what a split becomes: targets, routers, blueprints, results. Rows as in bad_inputs.py."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.bad_inputs import Bad, write

_UNION = "--method token_clusters --set split=union"
_STATIC = "--method static --set active=0.5"


def _as_stock(work: Path) -> None:
    path = work / "done/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "glm4_moe"}))


TABLE = [
    Bad("plan: text missing", "plan model --calib nowhere.txt", "'nowhere.txt' does not exist", "wikitext"),
    Bad("plan: a router for nothing", "plan model --method mlpmoe --router oracle", "routes nothing", "--router"),
    Bad("plan: static as a MoE", f"plan model {_STATIC} --target glm4_moe", "no FFN has routed experts", "dense"),
    Bad("static as a MoE", f"convert model out {_STATIC} --target ernie4_5_moe", "no FFN has routed", "dense"),
    Bad("plan: routed as dense", "plan model --method cmoe --target dense", "chooses experts per token", "moesaic"),
    Bad(
        "gated routers in a stock one",
        "convert model out --method cmoe --target mixtral",
        "only linear ones",
        "--router oracle",
    ),
    Bad(
        "normalised inputs",
        "plan model --method moefication --target mixtral",
        "the router has a bias",
        "--router oracle",
    ),
    Bad("plan: a router for free widths", f"plan model {_UNION} --router oracle", "cost", "--set widths=equal"),
    Bad("free widths in a stock one", f"convert model out {_UNION} --target mixtral", "widest", "--set widths=equal"),
    Bad("no gate path", "plan model --target glm4_moe --router oracle", "cannot hold", "moesaic", family="gpt2"),
    Bad(
        "a blueprint and a method",
        "convert model out --blueprint done --method cmoe --layout S1A1E4",
        "says already how every FFN is split",
        "leave --method and --layout out",
    ),
    Bad(
        "settings: unknown key of a section",
        "convert model out --config s.yaml",
        "no option 'calibration.token'",
        "sources, tokens",
        write("s.yaml", "calibration: {token: 5}"),
    ),
    Bad("undo: a stock architecture", "undo done out", "architecture glm4_moe", "--target moesaic", _as_stock),
    Bad("eval: damaged results", "eval done --window 64", "is damaged", "delete it", write("done/results.json", "{")),
    Bad("export: damaged results", "export done out --to dense", "damaged", "delete", write("done/results.json", "{")),
    Bad("inspect: results no object", "inspect done", "no JSON object", "delete", write("done/results.json", "[]")),
]
