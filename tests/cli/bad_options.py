"""Bad options of a conversion: what they say, and what they contradict. The same kind of rows as in bad_inputs.py."""

from __future__ import annotations

from tests.cli.bad_inputs import Bad, write

_MLPMOE = "convert model out --method mlpmoe"

TABLE = [
    Bad("layout unreadable", "convert model out --layout 3of8", "cannot read layout '3of8'", "SxAyEz"),
    Bad("experts > neurons", "convert model out --layout S1A1E64", "only 37 neurons", "fewer"),
    Bad(
        "ridge too small",
        "convert model out --method token_clusters --config s.yaml",
        "global_ridge: Input should be greater",
        "",
        write("s.yaml", "options: {global_ridge: 1.0e-8}"),
    ),
    Bad(
        "option of studies",
        "convert model out --method token_clusters --set global_ridge=0.2",
        "--set does not take global_ridge",
        r"options={'global_ridge': 0.2} of moesaic.convert; or a settings file",
    ),
    Bad(
        "option of studies, in a section",
        "convert model out --method tomoe --set train='{steps: 4, clip: 1}'",
        "--set does not take train.clip",
        "options={'train': {'clip': 1}}",
    ),
    Bad("option with a flag", "convert model out --method tomoe --set train.seed=1", "not take train.seed", "--seed"),
    Bad("no section", "convert model out --set layout=a --set layout.x=1", "layout holds no mapping"),
    Bad("budget without blueprint", "convert model out --budget 0.5", "none is given", "--blueprint"),
    Bad(
        "another fraction for a blueprint",
        "convert model out --blueprint done --active 0.5",
        "says already how every FFN is split",
        "leave --active out; --budget",
    ),
    Bad(
        "settings: method a list",
        "convert model out --config s.yaml",
        "unknown method",
        arrange=write("s.yaml", "method: [a]"),
    ),
    Bad("branches > neurons", "convert model out --method mlpmoe --set branches=99", "only 37 neurons", "fewer"),
    Bad("top-k > experts", "convert model out --layout S3A6E8", "top-k 6", "z - x"),
    Bad("shared > units", "convert model out --layout S9A0E8", "more shared units than units"),
    Bad("nothing active", "convert model out --layout S0A0E8", "nothing active"),
    Bad("active out of range", "convert model out --active 1.5", r"not in \(0, 1\]"),
    Bad("active no eighths", "convert model out --active 0.7", "no number of eighths", "S3A3E8"),
    Bad("layout and active", "convert model out --layout S3A3E8 --active 0.5", "both --layout and --active", "one"),
    Bad("unknown method", "convert model out --method cmoo", "unknown method 'cmoo'", "cmoe"),
    Bad("unknown method, listed", "methods cmoo", "unknown method 'cmoo'", "cmoe"),
    Bad("unknown option", "convert model out --set layuot=S3A3E8", "no option 'layuot'", "layout"),
    Bad("option of another type", "convert model out --set iterations=many", "iterations: .*integer", ""),
    Bad("option without value", "convert model out --set iterations", "cannot read --set", "key=value"),
    Bad("option no YAML", "convert model out --set 'layout=['", "cannot read the value of --set"),
    Bad("unknown flag", "convert model out --layuot S3A3E8", "No such option: --layuot", code=2),
    Bad("flag of another type", "convert model out --seed many", "'--seed': Input should be a valid integer", code=2),
    Bad("OUT left out", "convert model", "Missing argument 'OUT'", code=2),
    Bad("unknown verb", "covnert model out", "No such command 'covnert'", code=2),
    Bad(
        "dense layer out of range",
        f"{_MLPMOE} --dense-layers 2",
        "dense layer 2 of a model with 2 layers",
    ),
    Bad("all layers dense", f"{_MLPMOE} --dense-layers 0,-1", "every layer is kept dense"),
    Bad(
        "dense layers unreadable",
        f"{_MLPMOE} --dense-layers first",
        "cannot read --dense-layers",
        "0,1,-1",
    ),
    Bad("settings missing", "convert model out --config no.yaml", "no.yaml does not exist", "--config"),
    Bad("settings a folder", "convert model out --config model", "model cannot be read", ""),
    Bad(
        "settings: unknown key",
        "convert model out --config s.yaml",
        "no option 'methd'",
        "method",
        write("s.yaml", "methd: cmoe"),
    ),
    Bad("settings: a list", "convert model out --config s.yaml", "holds no mapping", arrange=write("s.yaml", "- a")),
    Bad("settings: no YAML", "convert model out --config s.yaml", "cannot be read", "", write("s.yaml", "a: [\nb: }")),
    Bad(
        "settings: section a word",
        "convert model out --config s.yaml",
        "options holds no mapping",
        arrange=write("s.yaml", "options: cmoe"),
    ),
]
