"""What the written files must say so that no engine computes something else from them without complaint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.reader import Checkpoint
from moesaic.targets import get_target
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import plans_for, relative, run_reference, run_stock, split_for, write
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]
TIED = ["glm4_moe", "granitemoeshared", "qwen2_moe", "mixtral", "ernie4_5_moe"]


@pytest.fixture
def written(tiny: Tiny, tmp_path: Path) -> Callable[..., tuple[Checkpoint, dict[str, Any]]]:
    """``written("llama", "glm4_moe")``: the folder of a target and its config.json."""

    def make(family: str, target: str, layout: str = "S2A2E6", **options: Any) -> tuple[Checkpoint, dict[str, Any]]:
        plans = plans_for(tiny(family), layout)
        out = write(tiny(family), plans, tmp_path / f"{family}-{target}", target, TargetOptions(**options))
        return Checkpoint(out), json.loads((out / "config.json").read_text())

    return make


@pytest.mark.parametrize("target", TIED)
def test_the_head_is_written_where_the_dense_model_ties_it(target: str, written: Any) -> None:
    output, config = written("llama", target)
    assert config["tie_word_embeddings"] is False
    assert torch.equal(output.tensor("lm_head.weight"), output.tensor("model.embed_tokens.weight"))


def test_qwen2_moe_has_zero_biases_for_a_source_without_biases(written: Any) -> None:
    output, config = written("llama", "qwen2_moe")
    assert config["qkv_bias"] is True
    for name in ("q_proj", "k_proj", "v_proj"):
        bias = output.tensor(f"model.layers.1.self_attn.{name}.bias")
        assert bias.shape == output.tensor(f"model.layers.1.self_attn.{name}.weight").shape[:1]
        assert not bias.any()


def test_qwen2_moe_keeps_the_biases_of_its_source(written: Any, tiny: Tiny) -> None:
    output, _ = written("qwen2", "qwen2_moe")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(output.tensor(name), Checkpoint(tiny("qwen2")).tensor(name))


def test_qwen2_moe_has_a_small_shared_gate_that_is_nowhere_zero(written: Any) -> None:
    output, _ = written("llama", "qwen2_moe")
    gate_1D = output.tensor("model.layers.0.mlp.shared_expert_gate.weight")
    assert bool((gate_1D != 0).all())
    assert gate_1D.abs().max() < 1e-6


def test_qwen2_moe_divides_by_no_sum_and_multiplies_by_the_number_of_experts(written: Any, tiny: Tiny) -> None:
    output, config = written("llama", "qwen2_moe")
    assert config["norm_topk_prob"] is False
    plan = plans_for(tiny("llama"))["model.layers.0.mlp"]
    dense_DF = Checkpoint(tiny("llama")).tensor("model.layers.0.mlp.down_proj.weight")
    down_DM = output.tensor("model.layers.0.mlp.experts.2.down_proj.weight")
    width = int((plan.experts[2] >= 0).sum())
    torch.testing.assert_close(down_DM[:, :width], 4 * dense_DF[:, plan.experts[2][:width]], rtol=0, atol=0)


@pytest.mark.parametrize("target", ["glm4_moe", "granitemoeshared", "mixtral"])
def test_rope_is_written_in_new_and_old_keys(target: str, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = build_tiny("llama", tmp_path / "dense", rope_parameters=rope)
    config = json.loads((write(folder, plans_for(folder), tmp_path / "out", target) / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config["rope_parameters"].items() >= rope.items()
    if target == "glm4_moe":  # its own default rotates half of each head
        assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 1.0


def test_old_style_rope_scaling_is_understood(tiny: Tiny, tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    out = json.loads((write(folder, plans_for(folder), tmp_path / "out", "glm4_moe") / "config.json").read_text())
    assert out["rope_parameters"].items() >= {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}.items()


def test_token_ids_of_the_dense_model_replace_the_defaults_of_the_target(written: Any) -> None:
    _, config = written("mistral", "mixtral")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 1)


def test_absent_token_ids_are_written_as_null(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense", bos_token_id=None, pad_token_id=None)
    config = json.loads((write(folder, plans_for(folder), tmp_path / "out", "mixtral") / "config.json").read_text())
    assert config["bos_token_id"] is None
    assert config["pad_token_id"] is None


def test_glm4_moe_predicts_one_token(written: Any) -> None:
    _, config = written("llama", "glm4_moe")
    assert config["num_nextn_predict_layers"] == 0


def test_glm4_moe_has_groups_of_two_and_weights_of_one_in_pairs(written: Any) -> None:
    """All engines add up the best two scores of a group, so a group of one would crash or choose something else."""
    output, config = written("llama", "glm4_moe", exact_weights=True)
    assert config["n_routed_experts"] == 2 * config["n_group"] == 8
    assert (config["topk_group"], config["num_experts_per_tok"]) == (2, 2)
    assert (config["norm_topk_prob"], config["routed_scaling_factor"]) == (False, 2.0)
    twin = "model.layers.0.mlp.experts.1"
    assert not any(output.tensor(f"{twin}.{name}_proj.weight").any() for name in ("gate", "up", "down"))
    _, plain = written("mistral", "glm4_moe", exact_weights=False)
    assert (plain["n_group"], plain["topk_group"]) == (1, 1)
    assert plain["n_routed_experts"] >= 2


@pytest.mark.parametrize("layout", ["S4A4E8", "S7A1E8", "S0A8E8"])
@pytest.mark.parametrize("target", ["glm4_moe", "granitemoeshared"])
def test_experts_that_are_always_on_need_no_pairs_and_no_scores(layout: str, target: str, tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    plans = plans_for(folder, layout)
    output = Checkpoint(write(folder, plans, tmp_path / "out", target))
    assert get_target(target).exact(split_for(folder, plans), TargetOptions())
    assert (output.config.get("n_group", 1), output.config.get("topk_group", 1)) == (1, 1)
    routers = [name for name in output.names if name.endswith(("mlp.gate.weight", "router.layer.weight"))]
    assert len(routers) == 2
    assert not any(output.tensor(name).any() for name in routers)
    assert relative(run_stock(tmp_path / "out"), run_reference(folder, plans)) < 1e-2  # bf16


def test_granitemoeshared_adds_a_zero_bias_where_one_switch_stands_for_four(written: Any) -> None:
    output, config = written("qwen2", "granitemoeshared")
    assert config["attention_bias"] is True
    assert not output.tensor("model.layers.0.self_attn.o_proj.bias").any()
    assert output.tensor("model.layers.0.self_attn.q_proj.bias").any()


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe"])
def test_heads_of_another_width_are_refused_where_engines_compute_it(target: str, tmp_path: Path) -> None:
    folder = build_tiny("mistral", tmp_path / "dense", head_dim=16)
    reasons = get_target(target).reasons(split_for(folder, plans_for(folder)))
    assert len(reasons) == 1
    assert "head_dim is 16" in reasons[0]


@pytest.mark.parametrize("align", [8, 64])
def test_widths_are_aligned_and_padded_with_zeros(align: int, written: Any, tiny: Tiny) -> None:
    output, config = written("llama", "glm4_moe", align=align, exact_weights=False)
    assert config["moe_intermediate_size"] % align == 0
    shared = output.info("model.layers.0.mlp.shared_experts.up_proj.weight").shape[0]
    assert shared == config["n_shared_experts"] * config["moe_intermediate_size"]
    plan = plans_for(tiny("llama"))["model.layers.0.mlp"]
    up_MD = output.tensor("model.layers.0.mlp.experts.1.up_proj.weight")
    real = int((plan.experts[1] >= 0).sum())
    assert bool((up_MD[:real] != 0).any(1).all())
    assert not up_MD[real:].any()


def test_routers_are_fp32_in_a_bf16_checkpoint(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    output = Checkpoint(write(folder, plans_for(folder), tmp_path / "out", "glm4_moe"))
    assert output.info("model.layers.0.mlp.gate.weight").dtype == "float32"
    assert output.info("model.layers.0.mlp.experts.0.up_proj.weight").dtype == "bfloat16"
    assert output.config["dtype"] == "bfloat16"


def test_config_carries_the_provenance_block(written: Any) -> None:
    _, config = written("llama", "glm4_moe")
    assert config["moesaic"].keys() >= {"version", "method", "source", "blueprint"}
