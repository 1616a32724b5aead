"""The `moesaic` architecture: the ways of computing an FFN, and which is taken (see `modeling_moesaic.py`).

A path is an object with a name. All paths of a layout compute the same function. :data:`PATHS` is the only table of
them, :func:`choose` the only place that decides.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .moesaic_measured import LAYOUTS, at, measured
from .moesaic_path_fused import FusedMasked, FusedSorted
from .moesaic_path_nested_rows import NestedRows
from .moesaic_path_neuron_rows import NeuronRows
from .moesaic_path_neurons import NeuronsEvery, NeuronsMasked
from .moesaic_path_packed import Every, Masked
from .moesaic_path_rows import Rows
from .moesaic_path_sorted import Sorted
from .moesaic_path_triton import TritonGrouped, TritonRows
from .moesaic_path_union import UnionEvery, UnionMasked
from .moesaic_slices import MATRIX_UNIT

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward


class Path(Protocol):
    """One way of computing an FFN.

    Attributes:
        name: What a user asks for. Paths of different layouts may share one.
        layout: How the experts it knows are stored: ``packed``, ``union`` (:class:`UnionFeedForward`), ``neurons``
            (:class:`NeuronFeedForward`) or ``nested`` (:class:`NestedFeedForward`).
    """

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> str: ...

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        """Whether it can compute this input: device, dtype, meta, compiling, routed or not. The layout is its own."""
        ...

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        """y_TD without the output bias, but for ``neurons`` and ``nested``, which have it. ``ffn`` has :meth:`choice`
        of experts, or ``chosen`` neurons, and :meth:`matrices`."""
        ...


Span = tuple[int, int | None]
Where = tuple[str | None, torch.dtype | None]


class Row(NamedTuple):
    """A path and when it is taken.

    Attributes:
        path: The path.
        fastest: Device and dtype -> numbers of tokens [from, below) at which it was measured to be the fastest. None
            stands for all devices, dtypes or numbers. Without an entry that fits, it runs only when asked for.
        per_expert: The numbers are tokens per routed expert.
        most_work: Dtype -> tokens that use all neurons, in models narrower than ``NARROW`` and in others. It is taken
            for no more work than theirs.
    """

    path: Path
    fastest: Mapping[Where, Span]
    per_expert: bool = False
    most_work: Mapping[torch.dtype, tuple[int, int]] = MappingProxyType({})

    def span(self, x_TD: Tensor, ffn: MoEFeedForward) -> Span | None:
        """Numbers of tokens [from, below) at which it is taken for inputs of this kind."""
        device = x_TD.device.type
        for where in ((device, x_TD.dtype), (device, None), (None, x_TD.dtype), ANY):
            if where in self.fastest:
                begin, end = self.fastest[where]
                times = ffn.experts if self.per_expert else 1
                end = None if end is None else end * times
                if x_TD.dtype in self.most_work and end is not None:
                    used = ffn.shared + ffn.top_k * ffn.width
                    narrow, others = self.most_work[x_TD.dtype]
                    most = narrow if x_TD.shape[1] < NARROW else others
                    end = min(end, most * ffn.neurons // max(used, 1))
                return begin * times, end
        return None


ANY: Where = (None, None)
FP32: Where = (None, torch.float32)
BF16: Where = ("cpu", torch.bfloat16)

# The compiled kernel on one thread of a Zen 4 CPU at 896 x 4864 against torch's dense FFN. With all rows it is faster
# up to 96 tokens in bf16. In fp32, MKL is faster where there is more work than that of so many tokens with all neurons
# (a Xeon of the fifth generation, 576 to 3584 wide). torch is four times slower in fp16. Without AVX-512 it is
# unmeasured. Where a unit multiplies tiles of bf16 (AMX), the kernel uses it, and is ahead up to 128 tokens (the Xeon).
WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
FEW_TOKENS = 65 if WIDE else 9
NARROW = 1024
FP32_WORK = {torch.float32: (33, 24)}
FEW: Mapping[Where, Span] = {
    ("cpu", torch.float16): (1, None if WIDE else 9),
    BF16: (1, 129 if MATRIX_UNIT else FEW_TOKENS),
    ("cpu", None): (1, FEW_TOKENS),
}
# Passes between products take the more time, the faster these are. Experts' own tokens pay later then.
FUSED: Mapping[Where, Span] = {BF16: (4, None), ("cpu", None): (16, None)}
FUSED_SORTED: Mapping[Where, Span] = {BF16: (256 if MATRIX_UNIT else 64, None), ("cpu", None): (64, None)}

# From the top, the first that supports an input and is the fastest for it. Numbers: benchmarks/ffn.py on a Zen 4 CPU
# (MKL for fp32, oneDNN for bf16), torch 2.13; those of unions on one thread at 896 x 4864, eight top-1 experts of about
# half the neurons. Other devices take the same until they are measured.
PATHS: tuple[Row, ...] = (
    Row(Rows("packed"), FEW, most_work=FP32_WORK),
    Row(Rows("union"), FEW, most_work=FP32_WORK),
    Row(FusedSorted("packed"), FUSED_SORTED),
    Row(FusedMasked("packed"), {BF16: (4, None)} if MATRIX_UNIT else {}),
    # oneDNN repacks its right operand, so that few tokens per expert gain little in bf16.
    Row(Sorted("packed"), {FP32: (5, None), ANY: (64, None)}),
    Row(Masked(), {ANY: (0, None)}),
    Row(Every(), {ANY: (0, None)}),
    # Below, copying rows per expert costs more than masking, which is dense at most.
    Row(FusedSorted("union"), {BF16: (512, None), ("cpu", None): (64, None)}, per_expert=True),
    Row(FusedMasked("union"), FUSED),
    Row(Sorted("union"), {ANY: (64, None)}, per_expert=True),
    Row(UnionMasked(), {ANY: (0, None)}),
    Row(UnionEvery(), {ANY: (0, None)}),
    # Before the kernel: with all neurons, it is the dense network bit for bit.
    Row(NeuronsEvery("neurons"), {ANY: (0, None)}),
    Row(NeuronRows(), {**FEW, BF16: (1, 17 if MATRIX_UNIT else FEW_TOKENS)}),  # its router has no use for tiles
    Row(NeuronsMasked("neurons"), {ANY: (0, None)}),
    Row(NestedRows(), {("cpu", None): (1, FEW_TOKENS)}),  # others decode all codes first
    Row(NeuronsEvery("nested"), {ANY: (0, None)}),
    Row(NeuronsMasked("nested"), {ANY: (0, None)}),
    # No GPU was at hand to measure them.
    Row(TritonRows("packed"), {}),
    Row(TritonRows("union"), {}),
    Row(TritonGrouped("packed"), {}),
    Row(TritonGrouped("union"), {}),
)


COMPILED = (Rows, FusedMasked, TritonRows, TritonGrouped)
PORTABLE = tuple(row for row in PATHS if not isinstance(row.path, COMPILED))
"""Those of torch alone, by the table: what is decided with them depends on no compiler, GPU or measurement."""


def choose(x_TD: Tensor, ffn: MoEFeedForward) -> Path:
    """The path for an input: the first of ``ffn.asked`` that supports it, or the fastest known.

    The fastest is what was measured on this machine, else what the table says.

    Raises:
        ValueError: none of the paths that were asked for supports it.
    """
    if not ffn.asked:
        for row in ffn.table:
            span = row.span(x_TD, ffn) if row.path.layout == ffn.layout else None
            if span is None or not row.path.supports(x_TD, ffn):
                continue
            if span[0] <= x_TD.shape[0] and (span[1] is None or x_TD.shape[0] < span[1]):
                return _measured(x_TD, ffn) or row.path
    able = [row.path for row in ffn.table if row.path.layout == ffn.layout and row.path.supports(x_TD, ffn)]
    for name in ffn.asked:
        for path in able:
            if path.name == name:
                return path
    wanted = f"path {' or '.join(ffn.asked)}" if ffn.asked else f"the fastest path of {type(ffn).__name__}"
    routed, gradients = "routed" if ffn.routed else "unrouted", " with gradients" if torch.is_grad_enabled() else ""
    kind = f"{routed} {ffn.layout} experts of width {ffn.width} in {x_TD.dtype} on {x_TD.device.type}{gradients}"
    raise ValueError(f"{wanted} cannot compute {kind}; these can: {', '.join(path.name for path in able) or 'none'}")


def _measured(x_TD: Tensor, ffn: MoEFeedForward) -> Path | None:
    """The path that was the fastest on this machine; None where that was not measured, or the table must decide."""
    if torch.compiler.is_compiling() or ffn.table is not PATHS or ffn.layout not in LAYOUTS or not ffn.routed:
        return None
    if x_TD.device.type != "cpu" or len(x_TD) == 0:
        return None
    fastest = measured(x_TD.dtype, torch.get_num_threads())
    if fastest is None:
        return None
    name = fastest[ffn.layout][at(len(x_TD))]
    paths = (row.path for row in PATHS if row.path.layout == ffn.layout and row.path.name == name)
    return next((path for path in paths if path.supports(x_TD, ffn)), None)
