"""Blueprints: validation, exact save and load, digest, diff."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan, Router, WeightFade
from moesaic.blueprint.model import Blueprint
from moesaic.errors import CheckpointError, InputError, ResourceError


def routed_plan(seed: int = 0) -> LayerPlan:
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    experts = (
        order[3:7],
        torch.cat([order[7:10], torch.tensor([-1])]),
        torch.cat([order[10:11], torch.full((3,), -1)]),
    )
    router = Router("gated", {"gate": torch.randn(3, 8), "up": torch.randn(3, 8)})
    return LayerPlan(11, order[:3], experts, 2, router, "scaled", torch.zeros(3), torch.zeros(3))


def blueprint(seed: int = 0) -> Blueprint:
    static = LayerPlan(
        5, torch.arange(0), (torch.tensor([0, 1, 2]), torch.tensor([3])), 2, fade=WeightFade((0.1, 0.2), "row")
    )
    sites = {"model.layers.0.mlp": routed_plan(seed), "model.layers.1.mlp.experts.3": static}
    return Blueprint("llama", "abc", "cmoe", {"layout": "S3A2E8"}, sites)


def attention_plan(seed: int = 0) -> AttentionPlan:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder": (3, 8), "norm_weight": (3,), "norm_bias": (3,), "decoder": (4, 3), "embedding": (3,)}
    predictor = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return AttentionPlan(4, torch.tensor([1]), **predictor, threshold=-0.37, cap=3)


def test_save_and_load_round_trip_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = blueprint()
    original.save(tmp_path)
    loaded = Blueprint.load(tmp_path)
    assert loaded.digest() == original.digest()
    assert original.diff(loaded) == []
    plan = loaded.sites["model.layers.1.mlp.experts.3"]
    assert plan.fade == WeightFade((0.1, 0.2), "row")
    assert [len(expert) for expert in plan.experts] == [3, 1]


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    """A full disk comes as an error of the operating system or, from safetensors, as text; here the folder is gone."""
    plan = LayerPlan(4, torch.arange(4))
    with pytest.raises(ResourceError, match=r"cannot write .*gone.*No such file"):
        Blueprint("llama", "source", "test", {}, {"model.layers.0.mlp": plan}).save(tmp_path / "gone")


def test_digest_sees_every_change() -> None:
    torch.manual_seed(0)
    base = blueprint()
    plan = base.sites["model.layers.0.mlp"]
    variants = [
        replace(plan, top_k=1),
        replace(plan, gate="uniform"),
        replace(plan, shared=plan.shared.flip(0)),
        replace(plan, selection_bias=torch.tensor([0.0, 0.0, 1e-6])),
        replace(plan, router=Router("gated", {k: t + 1e-6 for k, t in plan.router.tensors.items()})),
        replace(plan, bias=torch.zeros(8)),
    ]
    digests = {replace(base, sites=base.sites | {"model.layers.0.mlp": variant}).digest() for variant in variants}
    assert len(digests | {base.digest()}) == len(variants) + 1


def test_diff_names_what_changed() -> None:
    torch.manual_seed(0)
    a, b = blueprint(0), blueprint(1)
    (lines,) = [[line for line in a.diff(b) if line.startswith("model.layers.0.mlp:")]]
    assert "experts have other neurons" in lines[0]
    b.sites.pop("model.layers.1.mlp.experts.3")
    assert any(line.endswith("converted -> dense") for line in a.diff(b))


def test_partition_is_recognised_and_its_size_counted() -> None:
    plan = routed_plan()
    assert plan.is_partition
    assert plan.active_neurons == pytest.approx(3 + 8 * 2 / 3)
    assert len(plan.packed) == 3 + 3 * 4
    assert not replace(plan, shared=plan.shared[:-1]).is_partition
    assert not replace(plan, readout=torch.zeros(8, 15)).is_partition
    doubled = torch.cat([plan.shared[:2], plan.shared[:1]])
    assert not replace(plan, shared=doubled).is_partition


def test_attention_is_saved_digested_and_diffed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = "model.layers.0.self_attn"
    whole, pruned = blueprint(), replace(blueprint(), attention={path: attention_plan()})
    whole = replace(whole, sites=pruned.sites)
    pruned.save(tmp_path)
    loaded = Blueprint.load(tmp_path)
    assert pruned.diff(loaded) == []
    assert loaded.attention[path].kept.tolist() == [1, 3]
    assert loaded.attention[path].spec() == attention_plan().spec()
    changes = [{"threshold": 0.0}, {"cap": None}, {"pairs": torch.tensor([0])}, {"decoder": torch.zeros(4, 3)}]
    variants = [{path: replace(attention_plan(), **change)} for change in changes]
    made = [whole, pruned, *(replace(pruned, attention=variant) for variant in variants)]
    assert len({each.digest() for each in made}) == len(made)
    assert loaded.digest() == pruned.digest()
    assert whole.diff(pruned) == [f"{path}: whole -> pruned"]
    assert pruned.diff(made[3]) == [f"{path}: cap 3 -> None"]
    assert pruned.diff(made[-1]) == [f"{path}: decoder differs"]


def test_experts_of_a_union_may_differ_in_width(tmp_path: Path) -> None:
    experts = (torch.arange(2), torch.arange(11), torch.arange(0))
    router = Router("linear", {"weight": torch.zeros(3, 4)})
    load_E = torch.tensor([0.25, 0.5, 0.25])
    plan = LayerPlan(11, torch.arange(0), experts, 1, router, union=True, load=load_E)
    assert (plan.varied, plan.expert_width, plan.active_neurons) == (True, 0, 6.0)
    made = Blueprint("llama", "abc", "token_clusters", {}, {"model.layers.0.mlp": plan})
    made.save(tmp_path)
    loaded = Blueprint.load(tmp_path)
    assert loaded.digest() == made.digest()
    assert made.diff(loaded) == []
    (again,) = loaded.sites.values()
    assert [len(expert) for expert in again.experts] == [2, 11, 0]
    assert again.active_neurons == 6.0


def test_blueprints_without_attention_or_union_have_the_digests_of_earlier_versions(tmp_path: Path) -> None:
    plan = LayerPlan(3, torch.arange(3))
    made = Blueprint("llama", "abc", "static", {}, {"model.layers.0.mlp": plan})
    assert made.digest() == "dd7e376fd98683f694ea2f1fdea333a15c84769cab2bfc33a047f4f94dedbd41"
    made.save(tmp_path)
    assert "attention" not in (tmp_path / "blueprint.json").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pairs": torch.tensor([], dtype=torch.long)}, "at least one"),
        ({"pairs": torch.tensor([1, 0])}, "ascending"),
        ({"pairs": torch.tensor([2])}, "in 0..1"),
        ({"encoder": None}, "lacks encoder"),
        ({"embedding": torch.zeros(4)}, "embedding of the value mask is not of shape"),
        ({"cap": 0}, "cap 0 of 4"),
        ({"cap": 5}, "cap 5 of 4"),
    ],
)
def test_impossible_attention_plans_are_refused(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(attention_plan(), **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top_k": 0}, "top-k 0 of 3"),
        ({"top_k": 4}, "top-k 4 of 3"),
        ({"router": Router("static")}, "static router with top-k 2 of 3"),
        ({"router": Router("static"), "top_k": 3}, "static router with gate 'scaled'"),
        ({"shared": torch.tensor([11])}, "outside 0..10"),
        ({"experts": (torch.tensor([0]), torch.tensor([1, 2]))}, "widths"),
        ({"load": torch.ones(2)}, "2 loads"),
        ({"load": torch.tensor([1.0, 0.5, -0.5])}, "perhaps negative"),
        ({"union": True, "fade": WeightFade((0.1, 0.1, 0.1))}, "weights of their own"),
        ({"union": True, "router": Router("static"), "top_k": 3, "gate": "uniform"}, "union under a static router"),
    ],
)
def test_impossible_plans_are_refused(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(routed_plan(), **change)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no blueprint"):
        Blueprint.load(tmp_path)
    blueprint().save(tmp_path)
    (tmp_path / "blueprint.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Blueprint.load(tmp_path)
    blueprint().save(tmp_path)
    path = tmp_path / "blueprint.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99"):
        Blueprint.load(tmp_path)


def test_trained_neurons_and_low_rank_routers_are_saved_digested_and_diffed(tmp_path: Path) -> None:
    router = Router("low_rank", {"reduce": torch.randn(3, 8), "weight": torch.randn(2, 3)})
    experts = (torch.tensor([2, 3]), torch.tensor([4, -1]))
    plan = LayerPlan(5, torch.tensor([0, 1]), experts, 1, router, projections={"up_FD": torch.randn(6, 8)})
    plain = replace(plan, projections={})
    made = [Blueprint("llama", "f" * 64, "secret_moe", {}, {"model.layers.0.mlp": p}) for p in (plan, plain)]
    made[0].save(tmp_path)
    again = Blueprint.load(tmp_path)
    assert again.digest() == made[0].digest() != made[1].digest()
    assert again.diff(made[0]) == []
    assert torch.equal(again.sites["model.layers.0.mlp"].projections["up_FD"], plan.projections["up_FD"])
    assert plan.spec()["router_rank"] == 3
    assert not plan.keeps_all
    assert plain.keeps_all
    torch.testing.assert_close(router.rows(), router.tensors["weight"] @ router.tensors["reduce"])


@pytest.mark.parametrize(
    "change", [{"readout": torch.ones(8, 12)}, {"expert_scale": torch.ones(3)}, {"fade": WeightFade((0.1,) * 3, "row")}]
)
def test_diff_is_empty_only_when_two_convert_alike(change: dict) -> None:
    torch.manual_seed(0)
    plan = routed_plan()
    assert plan.diff(plan) == []
    if "fade" in change:
        plan = LayerPlan(5, torch.arange(0), (torch.arange(2), torch.arange(2, 4), torch.arange(4, 5)), 3)
    changed = replace(plan, **change)
    assert plan.diff(changed)
    assert changed.diff(plan)


def test_files_may_be_read_by_others_and_a_blueprint_is_found_by_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = blueprint()
    made.save(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == 1
    assert modes.pop() & 0o600 == 0o600
    for given in (str(tmp_path), tmp_path / "blueprint.json"):
        assert Blueprint.load(given).digest() == made.digest()
    (tmp_path / "blueprint.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"blueprint\.safetensors is missing"):
        Blueprint.load(tmp_path)
