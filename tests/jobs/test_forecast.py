"""Forecasts of sizes against the bytes of written folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.jobs import forecast, native
from moesaic.jobs.controls import active_fraction
from moesaic.jobs.convert import expected_bytes
from moesaic.jobs.decide import decide
from moesaic.jobs.job import prepare
from moesaic.jobs.native import read_converted
from moesaic.jobs.pace import PER_CORE
from moesaic.jobs.request import check_options, check_request, outline_of
from moesaic.jobs.settings import ConvertSettings
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
WITH_FIGURES = ("README.md", "report.html", "results.json")
SMALL_FILES = 50_000
"""Bytes of configs, card and tokenizer, which are forecast roughly: 2 % of a model that is not as tiny."""


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def disk_of(folder: Path, **values: Any) -> forecast.DiskForecast:
    settings = ConvertSettings.model_validate(values)
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    outline = outline_of(settings, check_options(settings), anatomy)
    tokens = settings.calibration.tokens if outline.reads_text else 0
    source = forecast.read_source(checkpoint, anatomy)
    return forecast.disk(outline.split, outline.target, settings.target_options, source, tokens)


@pytest.fixture
def no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has no room for two models: sizes are the matter here."""
    monkeypatch.setattr(native, "too_large", lambda *_: "two models take more than there is")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model that is large enough for its weights to be nearly all of its bytes."""
    built: dict[str, Path] = {}

    def folder_of(family: str, d_ff: int = 515, **config: Any) -> Path:
        key = f"{family} {d_ff} {config}"
        if key not in built:
            folder = tmp_path_factory.mktemp(family) / "model"
            built[key] = build_tiny(family, folder, d_ff=d_ff, **WIDE, **config)
        return built[key]

    return folder_of


@pytest.mark.parametrize(
    ("family", "target", "layout", "options"),
    [
        ("llama", "moesaic", "S3A3E8", {}),
        ("gpt2", "moesaic", "S3A3E8", {}),
        ("llama", "glm4_moe", "S3A3E8", {}),
        ("llama", "glm4_moe", "S3A3E8", {"exact_weights": False}),
        ("llama", "glm4_moe", "S0A2E8", {"align": 64}),
        ("llama", "granitemoeshared", "S3A3E8", {"align": 64}),
        ("qwen2", "qwen2_moe", "S3A3E8", {}),
        ("llama", "mixtral", "S1A1E8", {}),
        ("olmo2", "flex_olmo", "S1A1E8", {}),
        ("llama", "ernie4_5_moe", "S3A2E8", {}),
    ],
)
def test_the_forecast_is_within_two_per_cent_of_what_is_written(
    family: str, target: str, layout: str, options: dict[str, Any], wide: Callable[..., Path], tmp_path: Path
) -> None:
    extra = {"n_embd": 128, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    dense = wide(family, **({"attention_bias": False} if family == "olmo2" else extra))
    out = write(dense, plans_for(dense, layout), tmp_path / "out", target, TargetOptions(**options))
    space = disk_of(dense, method="random", options={"layout": layout}, target=target, target_options=options)
    assert space.target == target
    assert space.output == pytest.approx(bytes_of(out), rel=0.02, abs=SMALL_FILES)


@pytest.mark.usefixtures("no_parity")
@pytest.mark.parametrize(
    ("method", "options", "target"),
    [
        ("cmoe", {"layout": "S3A3E8"}, "moesaic"),
        ("static", {"layout": "S3A3E8"}, "dense"),
        ("mlpmoe", {"branches": 8}, "moesaic"),
        ("mlpmoe", {"branches": 8, "keep": 6}, "moesaic"),
        ("random", {"layout": "S0A1E5"}, "mixtral"),
        ("random", {"layout": "S3A3E8"}, "glm4_moe"),
        ("token_clusters", {"active": 0.75, "experts": 4, "max_params": 2.0}, "glm4_moe"),
        ("token_clusters", {"active": 0.5, "experts": 4, "max_params": None}, "mixtral"),
        ("token_clusters", {"active": 0.5, "split": "disjoint", "experts": 16, "refit": "none"}, "glm4_moe"),
        ("token_clusters", {"active": 0.5, "split": "union", "experts": 16}, "moesaic"),
    ],
)
def test_conversions_of_every_kind_take_what_was_forecast(
    method: str, options: dict[str, Any], target: str, wide: Callable[..., Path], tmp_path: Path
) -> None:
    calibration = {"tokens": 128, "window": 64}
    dense = wide("llama")
    settings: dict[str, Any] = {"method": method, "options": options, "calibration": calibration}
    report = moesaic.plan(dense, settings)
    assert report.target == target
    assert report.mapped_bytes == pytest.approx(Checkpoint(dense).nbytes, rel=0.01)
    done = moesaic.convert(dense, tmp_path / "out", settings=settings)
    assert done.target == target
    # These grow with what is measured.
    written = bytes_of(done.output) - sum((done.output / name).stat().st_size for name in WITH_FIGURES)
    assert report.output_bytes == pytest.approx(written, rel=0.02, abs=SMALL_FILES)


@pytest.mark.usefixtures("no_parity")
def test_dense_layers_and_given_blueprints_are_counted(wide: Callable[..., Path], tmp_path: Path) -> None:
    dense = wide("llama")
    values: dict[str, Any] = {"method": "random", "options": {"layout": "S3A3E8"}, "target": "glm4_moe"}
    whole, part = disk_of(dense, **values), disk_of(dense, **values, dense_layers=(0,))
    assert part.output < whole.output
    done = moesaic.convert(dense, tmp_path / "out", settings=values | {"dense_layers": (0,)})
    assert part.output == pytest.approx(bytes_of(done.output), rel=0.05)
    settings = ConvertSettings.model_validate({"target": "glm4_moe"})
    given = prepare(check_request(dense, settings, blueprint=done.output))
    assert expected_bytes(given) == pytest.approx(part.output + part.staging, rel=0.001)


@pytest.mark.usefixtures("no_parity")
@pytest.mark.parametrize("options", [{"active": 0.75, "experts": 4, "max_params": 2.0}, {"active": 0.75, "experts": 1}])
def test_an_export_is_counted_from_the_dense_model_behind_it(
    options: dict[str, Any], wide: Callable[..., Path], tmp_path: Path
) -> None:
    """A folder of the moesaic architecture may hold more neurons than the dense model, or fewer."""
    settings: dict[str, Any] = {"method": "token_clusters", "options": options, "target": "moesaic"}
    made = moesaic.convert(wide("llama"), tmp_path / "own", settings=settings | {"calibration": {"tokens": 128}})
    checkpoint, blueprint, split = read_converted(made.output)
    source = forecast.read_converted_source(checkpoint, split.anatomy, blueprint.sites)
    assert source.nbytes == pytest.approx(Checkpoint(wide("llama")).nbytes, rel=0.01)
    dense = forecast.read_source(Checkpoint(wide("llama")), split.anatomy)
    assert (source.element, source.tied, source.biases) == (dense.element, dense.tied, dense.biases)


def test_what_needs_another_architecture_is_forecast_and_refused_as_such(wide: Callable[..., Path]) -> None:
    dense = wide("llama")
    options = {"active": 0.6, "attention": "both"}
    report = moesaic.plan(dense, method="tomoe", options=options)
    assert (report.target, report.active_ffn_fraction) == ("moesaic", pytest.approx(0.6, abs=0.01))
    assert any("no stock architecture has pruned attention" in remark for remark in report.remarks)
    for widths, says in {"free": "with a copy per expert, add --set widths=equal", "equal": "gets a copy per"}.items():
        report = moesaic.plan(dense, method="token_clusters", options={"split": "union", "widths": widths})
        assert (report.target, report.varied_widths) == ("moesaic", widths == "free")
        assert any(says in remark for remark in report.remarks)
        aligned = not any("is not a multiple of" in remark for remark in report.remarks)
        assert aligned == (widths == "free")  # a mean width is no shape of a kernel
    with pytest.raises(InputError, match="has no pruned attention"):
        check_request(dense, ConvertSettings(method="tomoe", options=options, target="glm4_moe"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"router": "oracle"}, "experts of different widths cost"),
        ({"target": "glm4_moe"}, "would compute the widest for every token"),
    ],
)
def test_what_needs_equal_widths_is_refused_by_plan_and_convert(
    more: dict[str, Any], says: str, wide: Callable[..., Path]
) -> None:
    values = {"method": "token_clusters", "options": {"split": "union"}} | more
    with pytest.raises(InputError, match=says) as refused:
        moesaic.plan(wide("llama"), values)
    assert "--set widths=equal" in str(refused.value.hint)
    with pytest.raises(InputError, match=says):
        check_request(wide("llama"), ConvertSettings.model_validate(values))
    values["options"] = {"split": "union", "widths": "equal"}
    assert moesaic.plan(wide("llama"), values).experts == 128


def test_a_blueprint_with_free_widths_is_refused_what_its_method_is(wide: Callable[..., Path], tmp_path: Path) -> None:
    values = {"method": "token_clusters", "options": {"split": "union", "experts": 4}, "calibration": {"tokens": 128}}
    made = moesaic.convert(wide("llama"), tmp_path / "out", settings=values)
    for more, says in ({"router": "oracle"}, "counts what experts"), ({"target": "mixtral"}, "compute the widest"):
        with pytest.raises(InputError, match=says):
            prepare(check_request(wide("llama"), ConvertSettings.model_validate(more), blueprint=made.output))
    again = moesaic.convert(wide("llama"), tmp_path / "again", settings={}, blueprint=made.output)
    assert again.blueprint.digest() == made.blueprint.digest()


@pytest.mark.parametrize(("method", "options"), [("mlpmoe", {"branches": 8}), ("static", {"active": 0.5})])
def test_a_router_for_what_is_always_on_is_refused(
    method: str, options: dict[str, Any], wide: Callable[..., Path], tmp_path: Path
) -> None:
    values: dict[str, Any] = {"method": method, "options": options, "router": "oracle"}
    with pytest.raises(InputError, match="routes nothing"):
        check_request(wide("llama"), ConvertSettings.model_validate(values))
    made = moesaic.convert(wide("llama"), tmp_path / "out", method="mlpmoe", options={"branches": 8}, target="moesaic")
    with pytest.raises(InputError, match="the blueprint routes nothing"):
        prepare(
            check_request(wide("llama"), ConvertSettings.model_validate({"router": "oracle"}), blueprint=made.output)
        )


def test_a_disk_that_holds_the_model_but_not_its_twins_is_refused(
    wide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = wide("llama")
    between = (Checkpoint(dense).nbytes * 1.3) + 64 * 2**20
    usage = type("usage", (), {"free": int(between)})
    monkeypatch.setattr("moesaic.staging.placement.shutil.disk_usage", lambda folder: usage)
    values: dict[str, Any] = {"method": "random", "options": {"layout": "S3A3E8"}}
    with pytest.raises(ResourceError, match="the output needs about"):
        moesaic.convert(dense, tmp_path / "out", settings=values | {"target": "glm4_moe"})
    assert not list(tmp_path.iterdir())
    assert moesaic.convert(dense, tmp_path / "out", settings=values | {"target": "moesaic"}).output.exists()


def test_without_weights_the_plan_counts_from_the_config(wide: Callable[..., Path], tmp_path: Path) -> None:
    dense = wide("llama")
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    values: dict[str, Any] = {"method": "random", "options": {"layout": "S3A3E8"}, "target": "glm4_moe"}
    full, bare = moesaic.plan(dense, values), moesaic.plan(tmp_path, values)
    tokenizer = sum(path.stat().st_size for path in Checkpoint(dense).side_files())
    assert bare.output_bytes == pytest.approx(full.output_bytes - tokenizer, rel=0.01)
    assert any("as glm4_moe" in remark for remark in bare.remarks)


def test_what_a_method_solves_shows_in_the_time(wide: Callable[..., Path]) -> None:
    def counted(**options: Any) -> float:
        report = moesaic.plan(wide("llama"), method="token_clusters", options=options)
        assert report.seconds > report.operations / 1e12
        return report.operations

    assert counted(experts=1, refit="none") < counted(experts=1) < counted(experts=8) < counted(experts=32)


def test_calibration_shows_in_memory_and_staging(wide: Callable[..., Path]) -> None:
    """Three buffers of all tokens, as long as they need not go to files."""
    dense, more = wide("llama"), 65536 - 2048

    def planned(tokens: int, **values: Any) -> moesaic.PlanReport:
        calibration = {"tokens": tokens, "compute_dtype": "float32"}
        return moesaic.plan(dense, method="cmoe", calibration=calibration, **values)

    few, many = planned(2048), planned(65536)
    assert many.peak_bytes - few.peak_bytes == 3 * 4 * more * 128
    assert planned(65536, memory="500MB").peak_bytes == planned(2048, memory="500MB").peak_bytes - 3 * 4 * 2048 * 128
    assert many.staging_bytes - few.staging_bytes == 2 * 4 * more * 128
    assert moesaic.plan(dense, method="random").staging_bytes < few.staging_bytes


def test_what_a_method_holds_per_token_shows_in_memory(wide: Callable[..., Path]) -> None:
    def per_token(method: str, **options: Any) -> float:
        few, many = (
            moesaic.plan(wide("llama"), method=method, options=options, calibration={"tokens": n}).peak_bytes
            for n in (2048, 4096)
        )
        return (many - few) / 2048

    for widths, more in {"equal": 3, "free": 4}.items():
        held = per_token("token_clusters", split="union", experts=9, widths=widths) - per_token("static")
        assert held == 4 * (more * 515 + 3 * 9)


def test_a_batch_of_a_training_shows_in_memory(wide: Callable[..., Path]) -> None:
    def peak(window: int, **train: Any) -> int:
        options = {"train": train}
        return moesaic.plan(wide("llama"), method="tomoe", options=options, calibration={"window": window}).peak_bytes

    one = peak(64, batch=1)
    assert peak(64, batch=5) - one == pytest.approx(peak(320, batch=1) - one) == 4 * (peak(64, batch=2) - one)
    assert peak(64, batch=4, accumulate=4) == one < peak(64, batch=1, precision="fp32")


def test_weights_of_a_training_stay_in_their_files_in_that_dtype_alone(wide: Callable[..., Path]) -> None:
    def outside(precision: str, **model: Any) -> int:
        report = moesaic.plan(wide("llama", **model), method="tomoe", options={"train": {"precision": precision}})
        return report.device_bytes - report.peak_bytes  # a GPU holds them in any case

    own = outside("bf16")
    assert own > 0
    assert outside("fp32", dtype="float32") == pytest.approx(2 * own, rel=1e-2)
    assert outside("bf16", dtype="float16") == outside("bf16", dtype="float32") == outside("fp32") == 0


def test_balanced_assignments_are_forecast(wide: Callable[..., Path]) -> None:
    report, copied = (moesaic.plan(wide("llama"), method=method) for method in ("moefication", "mlpmoe"))
    assert report.operations > copied.operations == 0


def test_plan_counts_what_is_active_and_trained(wide: Callable[..., Path]) -> None:
    dense = wide("llama")
    report = moesaic.plan(dense, method="random", options={"layout": "S3A3E8"}, dense_layers=(0,))
    assert report.active_ffn_parameters == pytest.approx(report.ffn_parameters * 7 / 8, rel=2e-3)
    assert report.router_parameters == 5 * 128
    assert report.padding_per_layer == 0  # what is over is shared
    assert moesaic.plan(dense, method="random", options={"layout": "S0A4E8"}).padding_per_layer == 8 * 65 - 515
    assert moesaic.plan(dense, method="cmoe", options={"layout": "S3A3E8"}).router_parameters == 2 * 2 * 5 * 128

    few, many = (moesaic.plan(dense, method="secret_moe", options={"steps": steps}) for steps in (1, 400_001))
    per_step = 3 * 6 * 2 * 128 * 515 * 0.75  # a batch of tokens: counted by the next line
    batch = moesaic.methods.get_config("secret_moe")().batch
    assert many.operations - few.operations == pytest.approx(400_000 * per_step * batch)
    speed = (many.operations - few.operations) / (many.seconds - few.seconds) / 1e9 / (os.cpu_count() or 1)
    assert any(speed == pytest.approx(known, rel=0.01) for known in PER_CORE.values())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cmoe", {"layout": "S3A3E9"}),
        ("moefication", {"layout": "S0A6E8", "expert_width": 17}),
        ("mlpmoe", {"branches": 4, "fade_max": 0.6, "fade_unit": "neuron"}),
        ("mlpmoe", {"branches": 4, "keep": 2, "fade_max": 0.5, "fade_unit": "neuron"}),
    ],
)
def test_plan_says_the_active_fraction_that_convert_makes(
    method: str, options: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    values = {"method": method, "options": options, "calibration": {"tokens": 256, "window": 64}}
    made = decide(prepare(check_request(tiny("llama"), ConvertSettings.model_validate(values))))
    expected = moesaic.plan(tiny("llama"), **values).active_ffn_fraction
    pruned = "keep" in options  # which branches are kept shows later
    assert expected == pytest.approx(active_fraction(made), abs=0.15 if pruned else 0.02)


@pytest.mark.parametrize(
    ("values", "target"),
    [
        ({"method": "moefication"}, "moesaic"),
        ({"method": "moefication", "router": "oracle"}, "glm4_moe"),
        ({"method": "llama_moe", "options": {"layout": "S0A2E4", "gate": "softmax_topk"}}, "mixtral"),
        ({"method": "llama_moe", "options": {"layout": "S0A2E4"}}, "glm4_moe"),
        ({"method": "mlpmoe", "options": {"branches": 4}}, "moesaic"),
    ],
)
def test_the_likely_target_is_the_one_that_auto_takes(
    values: dict[str, Any], target: str, tiny: Callable[[str], Path], tmp_path: Path, no_parity: None
) -> None:
    values = {"calibration": {"tokens": 256, "window": 64}} | values
    assert moesaic.plan(tiny("llama"), **values).target == target
    assert moesaic.convert(tiny("llama"), tmp_path / "out", **values).target == target
