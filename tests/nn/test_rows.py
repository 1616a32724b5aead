"""The compiled kernel and its layout: shapes beside its vectors, bad index sets, what happens to the weights.

Axes: T tokens, D model width, P neurons, E experts, K experts per token.
"""

from __future__ import annotations

import copy
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moesaic.nn import moesaic_kernel
from moesaic.nn.ffn import ACTIVATIONS as KNOWN
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_kernel import ACTIVATIONS, WEIGHTS
from moesaic.nn.moesaic_path_rows import BLOCKS_FROM, computed
from moesaic.nn.moesaic_paths import choose
from moesaic.nn.moesaic_side_by_side import lay, lies
from moesaic.nn.moesaic_union import UnionFeedForward, build_feed_forward
from tests.ffns import relative_error

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Of the output alone, which is rounded once."""


def ffn_of(
    d_model: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    union: bool = False,
    gated: bool = True,
    biases: bool = False,
    activation: str = "silu",
    unit: int = 10,
) -> MoEFeedForward:
    """6 + 6 x 10 units of ten neurons, enough for two threads; random weights of outputs near 1."""
    torch.manual_seed(0)
    spec = {
        **{
            "neurons": 66 * unit,
            "shared": 6 * unit,
            "experts": 6,
            "expert_width": 10 * unit,
            "top_k": 2,
            "router": "linear",
        },
        **{"router_tensors": ["weight"], "normalise_input": False, "gate": "sigmoid", "selection_bias": False},
        **{"gated": gated, "gate_bias": gated and biases, "up_bias": biases, "down_bias": biases, "union": union},
    }
    ffn = build_feed_forward(spec, d_model, activation)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if isinstance(ffn, UnionFeedForward):
        ffn.membership.copy_(torch.rand(ffn.membership.shape) < 0.4)
    return ffn.to(dtype).requires_grad_(False)


def by_rule(ffn: MoEFeedForward, x_TD: Tensor, weight_TP: Tensor, rounded: torch.dtype = torch.float64) -> Tensor:
    """The sum over all neurons in float64, without the output bias. Activations are rounded to a dtype first."""
    x_TD = x_TD.double()

    def project(layer: nn.Linear) -> Tensor:
        return nn.functional.linear(x_TD, layer.weight.double(), None if layer.bias is None else layer.bias.double())

    up_TP = project(ffn.up_proj)
    h_TP = ffn.act_fn(up_TP) if ffn.gate_proj is None else ffn.act_fn(project(ffn.gate_proj)) * up_TP
    return (h_TP * weight_TP).to(rounded).double() @ ffn.down_proj.weight.double().t()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("d_model", "union", "gated", "biases", "activation"),
    [
        (1, False, True, False, "silu"),
        (31, True, True, True, "gelu"),
        (64, False, False, True, "relu"),
        (97, True, False, False, "relu2"),
        (160, False, True, True, "gelu_new"),
        (75, True, True, False, "gelu_pytorch_tanh"),
    ],
)
def test_any_width_activation_and_number_of_threads_gives_the_sum_over_the_chosen_neurons(
    d_model: int, union: bool, gated: bool, biases: bool, activation: str, dtype: torch.dtype, threads: int
) -> None:
    ffn = ffn_of(d_model, dtype, union=union, gated=gated, biases=biases, activation=activation)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 2, 3, 9, 37):
            x_TD = torch.randn(tokens, d_model).to(dtype)
            idx_TK = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
            weight_TK = torch.rand(tokens, 2)
            if isinstance(ffn, UnionFeedForward):
                member_EU = ffn.membership.double()
            else:
                member_EU = torch.eye(6, dtype=torch.float64).repeat_interleave(100, dim=1)
            weight_TU = torch.zeros(tokens, 6, dtype=torch.float64).scatter(1, idx_TK, weight_TK.double()) @ member_EU
            weight_TP = torch.cat([torch.ones(tokens, 60, dtype=torch.float64), weight_TU], dim=1)
            with torch.no_grad():
                lay(ffn)
                y_TD = computed(ffn, x_TD, idx_TK, weight_TK)
                assert torch.equal(y_TD, computed(ffn, x_TD, idx_TK, weight_TK))
            error = relative_error(y_TD.double(), by_rule(ffn, x_TD, weight_TP))
            # CPUs that multiply bf16 in pairs round activations.
            if tokens >= BLOCKS_FROM[dtype] and dtype == torch.bfloat16:
                error = min(error, relative_error(y_TD.double(), by_rule(ffn, x_TD, weight_TP, dtype)))
            assert error < BOUNDS[dtype], tokens
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("union", [False, True])
def test_more_tokens_than_are_computed_together_give_what_each_gives_alone(union: bool) -> None:
    ffn, x_TD = ffn_of(64, torch.float32, union=union), torch.randn(530, 64)
    with torch.inference_mode():
        y_TD, idx_TK = run_once(ffn, x_TD), ffn.choice(x_TD)[0]
        assert idx_TK.unique().numel() > 1
        for some in (slice(0, 1), slice(250, 260), slice(511, 530)):
            assert relative_error(y_TD[some].double(), run_once(ffn, x_TD[some]).double()) < 1e-5


@pytest.mark.parametrize("expert", [-1, 6, 2**40])
@pytest.mark.parametrize("union", [False, True])
def test_an_expert_that_does_not_exist_is_an_error_and_reads_nothing(union: bool, expert: int) -> None:
    ffn, x_TD = ffn_of(64, union=union), torch.randn(2, 64).bfloat16()
    lay(ffn)
    with pytest.raises(ValueError, match=r"^the router chose an expert that does not exist$"):
        computed(ffn, x_TD, torch.tensor([[0, 1], [2, expert]]), None)
    with pytest.raises(ValueError, match=r"^inputs of width 32 for an FFN of width 64$"):
        computed(ffn, x_TD[:, :32], torch.zeros(2, 1, dtype=torch.long), None)
    with pytest.raises(ValueError, match=r"^choices for 1 of 2 tokens"):
        computed(ffn, x_TD, torch.zeros(1, 1, dtype=torch.long), None)


def run_once(ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
    with torch.inference_mode(), use_path(ffn, "rows"):
        return ffn(x_TD).clone()


@pytest.mark.parametrize("gated", [True, False])
def test_weights_are_held_once_and_every_use_of_them_goes_on(gated: bool) -> None:
    ffn, x_TD = ffn_of(64, union=True, gated=gated), torch.randn(2, 64).bfloat16()
    original = copy.deepcopy(ffn.state_dict())
    y_TD = run_once(ffn, x_TD)
    assert lies(ffn)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (ffn.up_proj, ffn.down_proj)}
    assert len(storages) == 1
    assert ffn.up_proj.weight.untyped_storage().nbytes() == (3 if gated else 2) * 660 * 64 * 2

    copied = copy.deepcopy(ffn)
    assert torch.equal(run_once(copied, x_TD), y_TD)
    saved = ffn.state_dict()  # ordinary matrices, as they were
    assert all(torch.equal(saved[name], tensor) and saved[name].is_contiguous() for name, tensor in original.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in saved.values()}) == len(saved)

    run_once(ffn, x_TD)
    with torch.no_grad():
        ffn.load_state_dict({name: -t if t.is_floating_point() else t for name, t in original.items()})
    other = ffn_of(64, union=True, gated=gated)
    other.load_state_dict(ffn.state_dict())
    assert torch.equal(run_once(ffn, x_TD), run_once(other, x_TD))
    assert not torch.equal(run_once(ffn, x_TD), y_TD)


def test_training_goes_on_where_the_kernel_has_run() -> None:
    ffn, x_TD = ffn_of(64).requires_grad_(True), torch.randn(2, 64).bfloat16()
    fresh = copy.deepcopy(ffn)
    run_once(ffn, x_TD)
    for module in (ffn, fresh):
        assert choose(x_TD, module).name != "rows"
        module(x_TD).float().square().sum().backward()
        torch.optim.SGD(module.parameters(), 0.1).step()
    for name, own in ffn.named_parameters():  # products of views may add in another order
        assert relative_error(own.detach().double(), fresh.get_parameter(name).detach().double()) < 1e-2, name
    assert relative_error(run_once(ffn, x_TD).double(), run_once(fresh, x_TD).double()) < 1e-2


@pytest.mark.parametrize("by_train", [False, True])
def test_optimisers_that_know_no_strides_train_what_the_kernel_has_run(by_train: bool) -> None:
    ffn = ffn_of(64, torch.float32).requires_grad_(True)
    fresh, x_TD = copy.deepcopy(ffn), torch.randn(2, 64)
    for module in (ffn, fresh):
        optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            if module is ffn:
                run_once(ffn, x_TD)
                assert lies(ffn)
            if by_train:  # as a compiled model is told
                module.train()
                assert not lies(module)
            module(x_TD).square().sum().backward()
            optimiser.step()
    for name, own in ffn.named_parameters():
        assert relative_error(own.detach(), fresh.get_parameter(name).detach()) < 1e-4, name


def test_one_thread_may_take_the_weights_apart_while_another_computes() -> None:
    from tests.nn.test_neuron_kernel import ffn_of as neurons_of

    for ffn in (ffn_of(64), neurons_of(64)):
        x_TD, found = torch.randn(1, 64).bfloat16(), []
        expected, ffn.asked = run_once(ffn, x_TD), ("rows",)
        end = time.monotonic() + 1

        def compute(ffn: MoEFeedForward, x_TD: Tensor, found: list[Tensor], end: float) -> None:
            with torch.inference_mode():
                while time.monotonic() < end:
                    found.append(ffn(x_TD))

        threads = [threading.Thread(target=compute, args=(ffn, x_TD, found, end)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            ffn.state_dict()
        for thread in threads:
            thread.join()
        assert found
        assert all(torch.equal(y_TD, expected) for y_TD in found)


@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize("union", [False, True])
def test_what_no_token_chose_may_be_infinite(union: bool, tokens: int) -> None:
    ffn, x_TD = ffn_of(64, torch.float16, union=union), torch.rand(1, 64).half().expand(tokens, -1).contiguous()
    assert ffn.gate_proj is not None
    with torch.inference_mode():
        chosen = ffn.route(x_TD)[0][0]
        owners = ffn.membership if isinstance(ffn, UnionFeedForward) else torch.eye(6).repeat_interleave(100, dim=1)
        unused = torch.cat([torch.zeros(60, dtype=torch.bool), owners[chosen].sum(0) == 0])
        before = {}
        for path in ("masked", "sorted", "rows", "fused", "fused_sorted"):
            with use_path(ffn, path):
                before[path] = ffn(x_TD)
        for layer in (ffn.gate_proj, ffn.up_proj):
            layer.weight[unused] = 60000
        assert not ffn.up_proj(x_TD).isfinite().all()
        for path, expected in before.items():
            with use_path(ffn, path):
                assert torch.equal(ffn(x_TD), expected), path


def test_shared_and_wrapped_weights_stay_as_they_are() -> None:
    ffn, x_TD = ffn_of(64), torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        assert choose(x_TD, ffn).name == "rows"
        with torch.autocast("cpu"):
            assert choose(x_TD, ffn).name == "masked"
        torch.nn.utils.parametrizations.weight_norm(ffn.up_proj)
        assert choose(x_TD, ffn).name == "masked"
        shared = ffn_of(64).share_memory()
        assert choose(x_TD, shared).name == "masked"


def test_without_a_compiler_torch_computes_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-compiler-here")  # no other test's: each line is said once in a process
    monkeypatch.setattr(moesaic_kernel.logging.get_logger("transformers"), "propagate", True)
    moesaic_kernel.kernel.cache_clear()
    try:
        ffn, x_TD = ffn_of(64), torch.randn(1, 64).bfloat16()
        with torch.no_grad():
            assert [choose(x_TD, ffn).name for _ in range(2)] == ["masked"] * 2
    finally:
        moesaic_kernel.kernel.cache_clear()
    lines = [record.message for record in caplog.records]
    assert lines == [
        "few tokens are computed by torch, which is slower than the compiled kernel: "
        "there is no C++ compiler (no-compiler-here); CXX names one"
    ]


def test_a_kernel_is_compiled_once_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    first = moesaic_kernel.built(torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    stamp = first.stat().st_mtime_ns
    assert moesaic_kernel.built(torch.bfloat16) == first
    assert first.stat().st_mtime_ns == stamp
    whole = first.read_bytes()
    for length in (0, 63, 3000, len(whole) - 1):  # to load one of these ends the process
        first.write_bytes(whole[:length])
        assert not moesaic_kernel._whole(first)
    moesaic_kernel.built(torch.bfloat16)
    assert moesaic_kernel._whole(first)


def test_names_that_are_no_text_and_users_without_a_home_stop_no_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strange = tmp_path / os.fsdecode(b"\xff\xfe")
    with strange.open("wb+") as file:
        file.write(b"x" * 5000)
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            moesaic_kernel._openmp_runtime.cache_clear()
            moesaic_kernel._openmp_runtime()
    for name in ("HOME", "MOESAIC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no entry of his own
    with pytest.raises(moesaic_kernel.NoKernelError, match="cannot be made"):
        moesaic_kernel.cache_folder()


def test_two_processes_that_compile_at_once_leave_one_whole_kernel(tmp_path: Path) -> None:
    code = "import torch; from moesaic.nn.moesaic_kernel import built, kernel; print(built(torch.float16).name); "
    code += "assert kernel(torch.float16) is not None"
    environment = os.environ | {"MOESAIC_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = {process.communicate(timeout=240)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == list(names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor than x86-64: its own flag is -mcpu")
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_the_source_is_accepted_with_all_instructions_of_this_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """Where it is not, a kernel without them is made, which is slower and says nothing."""
    options = [*moesaic_kernel.FLAGS, "-march=native", "-fopenmp", f"-DWEIGHT={WEIGHTS[dtype]}", "-fsyntax-only"]
    for part, text in moesaic_kernel.PARTS.items():
        source = tmp_path / f"{part}.cpp"
        source.write_text(text)
        subprocess.run([moesaic_kernel._compiler(), *options, str(source)], check=True)


@pytest.mark.parametrize(("tokens", "top_k"), [(n, 2) for n in (2, 3, 15, 16, 33, 64, 100, 300)] + [(3, 6), (5, 1)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("union", [True, False])
def test_blocks_of_many_tokens_in_bf16(union: bool, gated: bool, tokens: int, top_k: int) -> None:
    """CPUs that multiply tiles do so here; they have 16 neurons and tokens, and a width that is a multiple of 32."""
    ffn = ffn_of(96, union=union, gated=gated, biases=True, unit=11)
    lay(ffn)
    x_TD = torch.randn(tokens, 96).bfloat16()
    idx_TK, weight_TK = torch.stack([torch.randperm(6)[:top_k] for _ in range(tokens)]), torch.rand(tokens, top_k)
    of_expert = torch.eye(6).repeat_interleave(110, dim=1)
    member_EU = ffn.membership.double() if isinstance(ffn, UnionFeedForward) else of_expert.double()
    weight_TU = torch.zeros(tokens, 6, dtype=torch.float64).scatter(1, idx_TK, weight_TK.double()) @ member_EU
    weight_TP = torch.cat([torch.ones(tokens, 66, dtype=torch.float64), weight_TU], dim=1)
    with torch.no_grad():
        y_TD = computed(ffn, x_TD, idx_TK, weight_TK).double()
    rules = [by_rule(ffn, x_TD, weight_TP, rounded) for rounded in (torch.float64, torch.bfloat16)]
    assert min(relative_error(y_TD, rule) for rule in rules) < BOUNDS[torch.bfloat16]


def test_activations_are_those_of_all_families() -> None:
    assert ACTIVATIONS.keys() >= KNOWN


def test_weights_that_were_made_in_inference_mode_stay_as_they_are() -> None:
    """torch forbids views of them outside that mode; calibration makes such FFNs for one pass."""
    with torch.inference_mode():
        ffn = ffn_of(32, torch.float32)
    x_TD = torch.randn(1, 32)
    with torch.no_grad():
        assert choose(x_TD, ffn).name != "rows"
        ffn(x_TD)
    assert all(layer.weight.is_contiguous() for layer in (ffn.up_proj, ffn.down_proj))
