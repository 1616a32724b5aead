"""Settings: flags over YAML over defaults; unknown keys and impossible values are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.cli.options import make_settings
from moesaic.errors import InputError
from moesaic.jobs.settings import ConvertSettings, method_config
from moesaic.options import build

_NONE: dict[str, Any] = dict.fromkeys(
    (
        "config",
        "method",
        "layout",
        "active",
        "options",
        "calib",
        "calib_tokens",
        "calib_window",
        "dense_layers",
        "hierarchical",
        "seed",
        "router",
        "target",
    )
)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: mlpmoe\nseed: 3\noptions: {branches: 8}\ncalibration: {tokens: 4096, window: 512}\n")
    settings = make_settings(**_NONE | {"config": path, "calib_tokens": 1024, "dense_layers": "0,-1"})
    assert settings.method == "mlpmoe"
    assert settings.seed == 3
    assert settings.calibration.tokens == 1024
    assert settings.calibration.window == 512
    assert settings.dense_layers == (0, -1)


def test_dense_layers_as_a_word_share_the_budget_out_and_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dense_layers: [0, 1]\n")
    settings = make_settings(**_NONE | {"config": path, "dense_layers": "any"})
    assert settings.allocation is not None
    assert settings.allocation.mode == "any"
    assert settings.dense_layers == ()
    path.write_text("allocation: auto\n")
    settings = make_settings(**_NONE | {"config": path, "dense_layers": "0"})
    assert settings.allocation is None
    assert settings.dense_layers == (0,)


def test_active_picks_the_layout() -> None:
    assert make_settings(**_NONE | {"method": "cmoe", "active": 0.5}).options["layout"] == "S2A2E8"
    assert make_settings(**_NONE | {"active": 0.5}).options == {"active": 0.5}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layout": "S3A3E8", "active": 0.5}, "both --layout and --active"),
        ({"layout": "3 of 8"}, "cannot read layout"),
        ({"options": ["branches"]}, "cannot read --set"),
        ({"dense_layers": "first"}, "cannot read --dense-layers"),
        ({"calib_tokens": -1}, "tokens"),
        ({"calib": [""]}, "empty calibration source"),
        ({"config": Path("no/such.yaml")}, "does not exist"),
    ],
)
def test_bad_flags_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_settings(**_NONE | changes)


@pytest.mark.parametrize(
    ("text", "says"), [("- a\n- b\n", "no mapping"), ("a: [", "cannot be read"), ("methd: cmoe", "methd")]
)
def test_bad_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        make_settings(**_NONE | {"config": path})


def test_unknown_method_options_name_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"method cmoe has no option 'layuot'.*layout"):
        method_config(ConvertSettings(method="cmoe", options={"layuot": "S3A3E8"}))
    with pytest.raises(InputError, match=r"unknown method 'moe'.*cmoe"):
        method_config(ConvertSettings(method="moe"))


def test_errors_are_one_line() -> None:
    with pytest.raises(InputError) as caught:
        build(ConvertSettings, {"seed": "many", "dense_layers": 3}, "settings")
    assert "\n" not in str(caught.value)
