"""Recovery end to end on tiny models: it helps, is written exactly, resumes, says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.blueprint.layer import LayerPlan, WeightFade
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.jobs.export import export
from moesaic.jobs.native import verify_native
from moesaic.jobs.tune import tune
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from moesaic.staging.manifest import MANIFEST_NAME, UNHASHED, check_manifest
from moesaic.targets.glm4_moe import Glm4MoE
from tests.tiny_models import build_tiny
from tests.train.processes import FSDP, two_processes
from tests.train.tasks import Kill
from tests.tune.students import IDS, Converted, convert
from tests.tune.test_student import as_cmoe

Tiny = Callable[[str], Path]
DATA = {"sources": ["tiny"], "tokens": 1024, "window": 32}
TRAIN: dict[str, Any] = {"steps": 12, "batch": 4, "held_out": 8, "eval_every": 6, "save_every": 4, "data": DATA}
FAST: dict[str, Any] = {"train": {**TRAIN, "learning_rate": 3e-3, "warmup": 0, "precision": "fp32"}}


@torch.inference_mode()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    moesaic.register()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()(input_ids=IDS, use_cache=False).logits


def settings(**changes: Any) -> dict[str, Any]:
    return {**FAST, **changes}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in UNHASHED - {MANIFEST_NAME}}


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Callable[..., Converted]:
    return lambda family="llama", **options: convert(tiny(family), tmp_path / "moe", **options)


def test_a_folder_of_the_moesaic_architecture_comes_nearer_to_the_dense_model(made: Any, tmp_path: Path) -> None:
    converted = made()
    done = tune(converted.folder, tmp_path / "out", baseline=converted.dense.folder, config=settings())
    held_out = done.results["tune"]["held_out"]
    assert held_out["after"]["kl"] < 0.9 * held_out["before"]["kl"]
    dense = logits(converted.dense.folder)
    before, after = (float((logits(folder) - dense).square().mean()) for folder in (converted.folder, done.output))
    assert after < before
    assert done.results["tune_parity"]["relative"] < 1e-5
    assert check_manifest(done.output) > 0
    source, written = Checkpoint(converted.folder), Checkpoint(done.output)
    assert set(source.names) == set(written.names)
    same = {name for name in source.names if torch.equal(source.tensor(name), written.tensor(name))}
    changed = set(source.names) - same
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    lines = [json.loads(line) for line in (done.output / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(13))
    assert (done.output / "train.png").stat().st_size > 10_000


def test_a_stock_folder_is_tuned_in_the_architecture_s_own_form_exactly(made: Any, tmp_path: Path) -> None:
    converted = made(target="glm4_moe")
    dense = converted.dense.folder
    done = tune(converted.folder, tmp_path / "out", baseline=dense, config=settings(router_rate=1e-2))
    assert done.target == "glm4_moe"
    assert {plan.gate for plan in done.blueprint.sites.values()} == {"sigmoid"}
    parity = done.results["native_parity"]
    assert parity["exact"] is True
    assert parity["relative"] < 1e-5
    config = Checkpoint(done.output).config
    assert config["model_type"] == "glm4_moe"
    assert (config["n_group"], config["norm_topk_prob"]) == (1, False)  # no twins, no approximation
    assert config["moesaic"]["tuned"]["trained"] == ["experts", "attention", "routers"]
    assert Blueprint.load(done.output).digest() == done.blueprint.digest() == config["moesaic"]["blueprint"]
    assert done.results["tune"]["held_out"]["after"]["kl"] < done.results["tune"]["held_out"]["before"]["kl"]
    assert torch.isfinite(logits(done.output, trust_remote_code=False)).all()


def test_an_interrupted_recovery_resumes_to_the_same_bytes(made: Any, tmp_path: Path) -> None:
    converted = made()
    keys = {"baseline": converted.dense.folder, "config": settings(router_rate=1e-2, gate="sigmoid")}
    whole = tune(converted.folder, tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        tune(converted.folder, tmp_path / "cut", **keys, progress=Kill(7))
    assert not (tmp_path / "cut").exists()
    with pytest.raises(InputError, match="another"):
        tune(converted.folder, tmp_path / "cut", **{**keys, "config": settings(router_rate=2e-2, gate="sigmoid")})
    resumed = tune(converted.folder, tmp_path / "cut", **keys)
    assert files(resumed.output) == files(whole.output)
    assert not (tmp_path / "cut.partial").exists()


def test_cmoe_s_recipe_trains_scales_and_biases(made: Any, tmp_path: Path) -> None:
    converted = made(change=as_cmoe)
    changes: dict[str, Any] = {"train": {**TRAIN, "precision": "fp32", "held_out": 0}}  # the last weights are kept
    done = tune(converted.folder, tmp_path / "out", config=changes, preset_name="cmoe")  # needs no dense model
    config = done.results["tune"]["config"]
    assert (config["lora"]["rank"], config["lora"]["alpha"], config["lora"]["dropout"]) == (8, 32.0, 0.1)
    assert (config["train"]["learning_rate"], config["train"]["betas"]) == (5.65e-5, [0.9, 0.95])
    for plan in done.blueprint.sites.values():
        assert plan.gate_scale is not None
        assert plan.selection_bias is not None
        assert float(plan.gate_scale.abs().sum()) > 0
        steps_E = (plan.selection_bias / 1e-3).round()
        torch.testing.assert_close(plan.selection_bias, steps_E * 1e-3)  # moved in steps of gamma
        assert float(steps_E.abs().sum()) > 0


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_other_families(family: str, made: Any, tmp_path: Path) -> None:
    converted = made(family) if family != "mixtral" else hierarchical(made, tmp_path)
    train = {**FAST["train"], "steps": 1, "held_out": 2}
    done = tune(converted.folder, tmp_path / "out", baseline=converted.dense.folder, config={"train": train})
    assert done.results["tune_parity"]["relative"] < 1e-5


def test_pruned_attention_stays_pruned(tiny: Tiny, tmp_path: Path) -> None:
    train = {"steps": 2, "batch": 2, "held_out": 2, "precision": "fp32"}
    options = {"active": 0.7, "experts": 3, "embedding": 16, "attention": "both", "union": True, "train": train}
    calibration = {"sources": ["tiny"], "tokens": 256, "window": 32}
    converted = moesaic.convert(
        tiny("llama"), tmp_path / "moe", method="tomoe", options=options, calibration=calibration
    )
    pruned = "model.layers.0.self_attn.q_proj.weight"
    full = Checkpoint(tiny("llama")).tensor(pruned)
    assert Checkpoint(converted.output).tensor(pruned).shape[0] < full.shape[0]
    done = tune(converted.output, tmp_path / "out", baseline=tiny("llama"), config=settings())
    held_out = done.results["tune"]["held_out"]
    assert held_out["after"]["kl"] < held_out["before"]["kl"]
    assert done.results["tune_parity"]["relative"] < 1e-5
    before, after = Checkpoint(converted.output), Checkpoint(done.output)
    assert {name: before.info(name).shape for name in before.names} == {n: after.info(n).shape for n in after.names}
    assert not torch.equal(before.tensor(pruned), after.tensor(pruned))


def test_experts_of_different_widths_are_tuned_and_their_router_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    calibration = {"sources": ["tiny"], "tokens": 512, "window": 32}
    options = {"split": "union", "experts": 4, "active": 0.5}
    converted = moesaic.convert(
        tiny("llama"), tmp_path / "moe", method="token_clusters", options=options, calibration=calibration
    )
    done = tune(converted.output, tmp_path / "out", baseline=tiny("llama"), config=settings())
    assert done.results["tune_parity"]["relative"] < 1e-5
    for path, plan in converted.blueprint.sites.items():
        tuned = done.blueprint.sites[path]
        assert tuned.varied
        assert tuned.active_neurons == plan.active_neurons
        assert torch.equal(tuned.router.tensors["weight"], plan.router.tensors["weight"])
    with pytest.raises(InputError, match="different widths cost"):
        tune(converted.output, tmp_path / "no", baseline=tiny("llama"), config=settings(gate="sigmoid"))


@pytest.mark.parametrize("environment", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_recover_what_one_does(environment: dict[str, str], made: Any, tmp_path: Path) -> None:
    converted = made(change=as_cmoe)
    config = {"train": {**FAST["train"], "batch": 4}, "scale_rate": 1e-3, "balance": 1e-2}
    keys = {"baseline": str(converted.dense.folder), "config": config}
    tune(converted.folder, tmp_path / "one", **keys)
    two_processes(
        "tests.jobs.convert_worker", environment, "tune", converted.folder, tmp_path / "two", json.dumps(keys)
    )
    assert check_manifest(tmp_path / "two") > 0
    one, two = (
        [json.loads(line).get("loss", 0) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)
    ours, theirs = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    for name in ours.names:
        torch.testing.assert_close(theirs.tensor(name), ours.tensor(name), rtol=1e-3, atol=1e-4, msg=name)


def hierarchical(made: Any, tmp_path: Path) -> Converted:
    """A MoE whose experts were converted."""
    source = build_tiny("mixtral", tmp_path / "mixtral")
    options = {"method": "random", "options": {"layout": "S2A2E6"}, "hierarchical": True, "target": "moesaic"}
    folder = moesaic.convert(source, tmp_path / "moe", **options).output
    dense = Checkpoint(source)
    return Converted(dense, folder, None, Blueprint.load(folder))  # type: ignore[arg-type]


def faded(plan: LayerPlan) -> LayerPlan:
    return replace(plan, fade=WeightFade((0.3,) * len(plan.experts)))


def test_bf16_weights_are_rounded_once_and_compared_as_written(tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    converted = convert(source, tmp_path / "moe", "glm4_moe", change=faded)
    done = tune(converted.folder, tmp_path / "out", baseline=source, config=settings(gate="keep"))
    assert {plan.gate for plan in done.blueprint.sites.values()} == {"uniform"}
    assert done.results["native_parity"]["exact"] is True
    assert done.results["native_parity"]["relative"] < 1e-5
    written = Checkpoint(done.output)
    assert written.config["n_group"] > 1
    assert {written.info(name).dtype for name in written.names if "proj" in name} == {"bfloat16"}


def test_what_was_tuned_says_so_and_is_not_undone(made: Any, tmp_path: Path) -> None:
    converted = made()
    dense = converted.dense.folder
    short = {"train": {**FAST["train"], "steps": 1}}
    own = tune(converted.folder, tmp_path / "own", baseline=dense, config=short).output
    with pytest.raises(InputError, match="trained after the conversion"):
        undo(own, tmp_path / "undone")
    with pytest.raises(InputError, match="trained after the conversion"):
        verify_output(own, baseline=dense)
    assert verify_output(own).oracle is None
    with pytest.raises(InputError, match=r"blueprint of .* trained after the conversion"):
        moesaic.convert(dense, tmp_path / "undone", blueprint=own)
    with pytest.raises(InputError, match=r"blueprint of .* trained after the conversion"):
        moesaic.convert(dense, tmp_path / "undone", blueprint=own / "blueprint.json")
    stock = export(own, tmp_path / "stock").output
    with pytest.raises(InputError, match="trained after the conversion"):
        verify_native(stock, dense)
    with pytest.raises(InputError, match="cannot be tuned again"):
        tune(stock, tmp_path / "twice", baseline=dense, config=short)
    again = tune(own, tmp_path / "again", baseline=dense, config=short)  # its own weights can be loaded
    first = json.loads((own / "results.json").read_text())["tune"]["held_out"]["after"]["kl"]
    # What was trained in fp32 was rounded to the folder's bf16.
    assert again.results["tune"]["held_out"]["before"]["kl"] == pytest.approx(first, rel=1e-2)
    assert not (tmp_path / "undone").exists()
    assert not (tmp_path / "twice").exists()


def test_an_output_that_computes_something_else_does_not_appear(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = made(target="glm4_moe")
    config_json = Glm4MoE.config_json
    monkeypatch.setattr(Glm4MoE, "config_json", lambda *args: config_json(*args) | {"routed_scaling_factor": 1.5})
    with pytest.raises(VerificationError, match="differs"):
        tune(converted.folder, tmp_path / "out", baseline=converted.dense.folder, config=settings(router_rate=1e-2))
    assert not (tmp_path / "out").exists()


BAD: list[tuple[dict[str, Any], Mapping[str, Any], str]] = [
    ({}, {"lora": None, "router_rate": 0}, "nothing is trained"),
    ({}, {"lora": None, "gate": "keep"}, "no router of this model gets a gradient"),
    ({"WORLD_SIZE": "3"}, {"train": {"batch": 4}}, "cannot be shared by 3 processes"),
    ({}, {"loss": {"kl": 0}}, "every loss has weight 0"),
    ({}, {"lora": {"rank": 0}}, "rank"),
    ({}, {"train": {"batch": 3, "accumulate": 2}}, "cannot be cut"),
    ({}, {"train": {"data": {"sources": ["no/such/file"]}}}, "does not exist"),
    ({}, {"train": {"data": {"sources": ["tiny"], "tokens": 10**9, "window": 32}}}, "tokens"),
    ({}, {"epochs": 3}, "no option 'epochs'"),
    ({"preset_name": "magic"}, {}, "unknown preset"),
    ({"baseline": None}, {}, "dense model is missing"),
]


@pytest.mark.parametrize(("keys", "config", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_is_refused_before_anything_is_written(
    keys: dict[str, Any],
    config: dict[str, Any],
    message: str,
    made: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = made()
    if processes := keys.get("WORLD_SIZE"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        keys = {}
    config = {**config, "train": {"data": DATA, **config.get("train", {})}} if "epochs" not in config else config
    with pytest.raises(InputError, match=message):
        tune(converted.folder, tmp_path / "out", **{"baseline": converted.dense.folder, "config": config, **keys})
    assert not list(tmp_path.glob("out*"))


def test_folders_that_are_not_ours_and_other_models_are_refused(made: Any, tiny: Tiny, tmp_path: Path) -> None:
    converted = made()
    with pytest.raises(InputError, match="not an output of moesaic"):
        tune(converted.dense.folder, tmp_path / "out", baseline=converted.dense.folder, config=settings())
    with pytest.raises(InputError, match="not the model that"):
        tune(converted.folder, tmp_path / "out", baseline=tiny("qwen2"), config=settings())
    with pytest.raises(InputError, match="exists"):
        tune(converted.folder, converted.dense.folder, baseline=converted.dense.folder, config=settings())


@pytest.mark.parametrize(("layout", "message"), [("S2A2E6", "router is gated"), ("S2A4E6", "no routers")])
def test_a_sigmoid_gate_that_cannot_be_given_is_refused(layout: str, message: str, made: Any, tmp_path: Path) -> None:
    converted = made(change=as_cmoe, layout=layout)
    with pytest.raises(InputError, match=message):
        tune(converted.folder, tmp_path / "out", baseline=converted.dense.folder, config=settings(gate="sigmoid"))
    assert not list(tmp_path.glob("out*"))


def test_a_target_that_cannot_hold_the_result_is_refused_before_training(made: Any, tmp_path: Path) -> None:
    converted = made(target="granitemoeshared")
    with pytest.raises(InputError, match="sigmoid"):
        tune(
            converted.folder,
            tmp_path / "out",
            baseline=converted.dense.folder,
            config=settings(router_rate=1e-2, gate="sigmoid"),
        )
    assert not list(tmp_path.glob("out*"))
