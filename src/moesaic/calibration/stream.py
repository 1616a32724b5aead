"""A model run layer by layer over all calibration windows, one decoder layer in memory at a time.

For each layer: :meth:`LayerStream.capture` shows what its FFNs read, :meth:`LayerStream.advance` completes it with the
FFNs given and moves on, so that every layer sees the converted ones before it (sequential calibration, CMoE section 3).
Layers and masks are transformers' own.

The layer at work is on the device; hidden states of all windows, what FFNs read and attention's outputs are in host
memory, or spilled to files, and visit the device one batch of windows at a time. Weights visit it once per layer.

Axes: N windows, W tokens per window, D model width, T = N W tokens, K active experts of an existing MoE.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moesaic.anatomy.base import Anatomy
from moesaic.calibration.inputs import Room, SiteInputs
from moesaic.calibration.skeleton import AttentionStandIn, ExpertsStandIn, FFNStandIn, Passed, Skeleton
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.nn.ffn import FFNWeights
from moesaic.options.device import exact_device
from moesaic.options.memory import SPILL_BYTES
from moesaic.solvers.team import ALONE, Team


class Captured(Mapping[str, SiteInputs]):
    """What the FFNs of one layer read, by site path. The tokens of a routed expert are gathered when it is looked up.

    Valid until the stream's next :meth:`LayerStream.capture`, which writes into the same buffers. ``stream_T``, as
    :class:`~moesaic.calibration.inputs.SiteInputs` has it, is of all tokens. ``device`` and ``room`` are those of each.
    """

    def __init__(
        self,
        stream_T: Tensor | None = None,
        device: torch.device | None = None,
        team: Team = ALONE,
        room: Room | None = None,
    ) -> None:
        self._stream_T = stream_T
        self._device = device
        self._team = team
        self._room = room
        self._inputs: dict[str, tuple[Tensor, Tensor | None, int]] = {}

    def add(self, path: str, x_TD: Tensor, index_TK: Tensor | None = None, expert: int = 0) -> None:
        """Register a site: all of ``x_TD``, or the tokens whose ``index_TK`` names ``expert``."""
        self._inputs[path] = (x_TD, index_TK, expert)

    def __getitem__(self, path: str) -> SiteInputs:
        x_TD, index_TK, expert = self._inputs[path]
        if index_TK is None:
            return SiteInputs(x_TD, self._stream_T, self._device, self._team, self._room)
        mine_T = (index_TK == expert).any(dim=1)
        stream_T = None if self._stream_T is None else self._stream_T[mine_T]
        return SiteInputs(x_TD[mine_T], stream_T, self._device, self._team, self._room)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def of_all(self, team: Team, windows: int) -> Captured:
        """What the FFNs read of all ``windows``, of which each process of ``team`` has its part."""
        gathered: dict[int, Tensor] = {}

        def gather(mine_T: Tensor) -> Tensor:
            if id(mine_T) not in gathered:  # the experts of a block have the same inputs
                part = team.part(windows)
                mine_NW = mine_T.unflatten(0, (part.stop - part.start, -1))
                gathered[id(mine_T)] = team.gather(mine_NW, windows).flatten(0, 1)
            return gathered[id(mine_T)]

        found = Captured(None if self._stream_T is None else gather(self._stream_T), self._device, team, self._room)
        for path, (x_TD, index_TK, expert) in self._inputs.items():
            found.add(path, gather(x_TD), None if index_TK is None else gather(index_TK), expert)
        return found


class _AllSeen(Exception):  # noqa: N818 - no error: ends a layer's forward once all its FFN inputs are known
    pass


class _Recorder:
    """In the place of an FFN or of a block's experts: writes what it reads, and where its tokens are routed, in order.

    ``group`` holds the recorders of the layer; the last of them to see a batch ends the layer's forward.
    """

    def __init__(self, x_TD: Tensor, group: list[_Recorder]) -> None:
        self.x_TD = x_TD
        self.index: list[Tensor] = []
        self.position = 0
        self._group = group
        group.append(self)

    def __call__(self, x_TD: Tensor, index_TK: Tensor | None = None) -> Tensor:
        end = self.position + len(x_TD)
        self.x_TD[self.position : end].copy_(x_TD)
        self.position = end
        if index_TK is not None:
            self.index.append(index_TK.cpu())
        if all(recorder.position == end for recorder in self._group):
            raise _AllSeen
        return torch.zeros_like(x_TD)


class LayerStream:
    """The model at one decoder layer, with the hidden states of all windows before it.

    Args:
        checkpoint: The model.
        anatomy: Of the same model.
        ids_NW: Token ids, int64 [N, W].
        compute_dtype: Of weights and hidden states in the forward pass.
        device: Where layers compute; None is the CPU.
        batch_windows: Windows run at a time.
        spill: Folder for buffers larger than ``spill_bytes``; None keeps all in memory. The files there lose their
            names at once and vanish with the process.
        spill_bytes: See ``spill``.

    Attributes:
        layer: The decoder layer at work; ``num_layers`` at the end.

    Raises:
        InputError: An id lies outside the vocabulary.
        CheckpointError: A tensor is missing, of another shape than config.json says, or not finite.
        ResourceError: No room for the spilled buffers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        ids_NW: Tensor,
        *,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        batch_windows: int = 1,
        spill: Path | None = None,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        self.ids_NW = ids_NW
        self.dtype = compute_dtype
        self.device = torch.device("cpu") if device is None else device
        self.num_layers = anatomy.num_layers
        self.layer = 0
        self._spill = spill
        self._spill_bytes = spill_bytes
        self._buffers: dict[str, Tensor] = {}
        self._batches = [slice(i, i + batch_windows) for i in range(0, len(ids_NW), batch_windows)]
        self._sites = {site.path: site for site in anatomy.sites}
        self._skeleton = Skeleton(checkpoint, anatomy, compute_dtype, self.device)
        self._passed = [Passed()] * self.num_layers
        self._table: dict[str, Callable[[Tensor], Tensor]] = {}
        self._module: nn.Module | None = None
        self._attention_NWD: Tensor | None = None
        self._hidden_NWD = self._buffer("hidden", (*ids_NW.shape, anatomy.d_model))
        self._embed()

    @torch.no_grad()
    def capture(self) -> Captured:
        """Run the current layer up to its FFNs, on all windows; returns what each FFN site reads, in ``compute_dtype``.

        Not needed before :meth:`advance`, which then computes the attention itself.
        """
        module = self._enter()
        recorders: list[_Recorder] = []
        captured_by: list[tuple[FFNStandIn | ExpertsStandIn, _Recorder]] = []
        for stand_in in module.modules():
            if isinstance(stand_in, FFNStandIn | ExpertsStandIn):
                x_TD = self._buffer(f"x{len(recorders)}", (self.ids_NW.numel(), self.anatomy.d_model))
                captured_by.append((stand_in, _Recorder(x_TD, recorders)))
        for stand_in, recorder in captured_by:
            if isinstance(stand_in, FFNStandIn):
                self._table[stand_in.path] = recorder
            else:
                stand_in.routed = recorder
        self._run_to_ffn(module)
        captured = Captured(self._stream_norms(), exact_device(self.device), room=self._room)
        for stand_in, recorder in captured_by:
            if isinstance(stand_in, FFNStandIn):
                captured.add(stand_in.path, recorder.x_TD)
            else:
                stand_in.routed = None
                index_TK = torch.cat(recorder.index)
                for expert, path in enumerate(stand_in.paths):
                    captured.add(path, recorder.x_TD, index_TK, expert)
        return captured

    def stored_weights(self, path: str) -> FFNWeights:
        """The dense FFN of a site as it is stored. Raises CheckpointError, or KeyError for an unknown path."""
        return load_ffn(self.checkpoint, self._sites[path], self.anatomy.activation)

    def weights(self, path: str) -> FFNWeights:
        """The same in ``compute_dtype``, on the device."""
        return self.stored_weights(path).to(self.dtype, self.device)

    @torch.no_grad()
    def advance(self, replacements: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> None:
        """Complete the current layer on all windows and move to the next.

        Args:
            replacements: Site path -> what computes that FFN, x_TD -> y_TD, both [T, D] in ``compute_dtype`` on the
                device; T is one batch of windows. Sites that are not named stay dense.

        Raises:
            KeyError: A path is no site of this layer.
        """
        module = self._enter()
        replacements = replacements or {}
        paths = [site.path for site in self.anatomy.sites_of(self.layer)]
        if strangers := replacements.keys() - set(paths):
            raise KeyError(f"{min(strangers)} is no FFN of layer {self.layer}")
        for path in paths:
            self._table[path] = replacements[path] if path in replacements else self.weights(path)
        attention, passed = _attention_of(module), self._passed[self.layer]
        for batch in self._batches:
            if attention is not None and self._attention_NWD is not None:
                attention.replay = self._attention_NWD[batch].to(self.device)
            made = module(self._hidden_NWD[batch].to(self.device), *passed.args, **passed.kwargs)
            self._hidden_NWD[batch].copy_(made[0] if self.anatomy.family.layers_return_tuples else made)
        self._leave(self.layer + 1)

    def state(self) -> dict[str, Tensor]:
        """All that a new stream over the same model and windows needs to go on from the current layer, bit for bit.

        These are the live buffers, not copies: save them before the next :meth:`advance`.
        """
        return {"hidden": self._hidden_NWD}

    def restore(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Go to ``layer`` with a saved state. Raises InputError when it is of other windows, width or precision."""
        hidden_NWD = state.get("hidden")
        mine = self._hidden_NWD
        if hidden_NWD is None or hidden_NWD.shape != mine.shape or hidden_NWD.dtype != mine.dtype:
            found = "nothing" if hidden_NWD is None else f"{list(hidden_NWD.shape)} {hidden_NWD.dtype}"
            raise InputError(
                f"the saved calibration state holds {found}, this run needs {list(mine.shape)} {mine.dtype}",
                "it is of another run: start again with --restart",
            )
        if not 0 <= layer <= self.num_layers:
            raise InputError(f"the saved calibration state is at layer {layer} of {self.num_layers}", "use --restart")
        mine.copy_(hidden_NWD)
        self._leave(layer)

    @torch.no_grad()
    def logits(self, window: int = 0) -> Tensor:
        """The model's output for one window, float32 [W, V], V the vocabulary, on the device. RuntimeError before the
        last layer."""
        if self.layer != self.num_layers:
            raise RuntimeError(f"logits need all {self.num_layers} layers, this stream is at layer {self.layer}")
        self._skeleton.load_outer()
        hidden_1WD = self._hidden_NWD[window : window + 1].to(self.device)
        self._skeleton.stand_ins[0].seen = lambda _hidden, _passed: hidden_1WD
        ids_1W = self.ids_NW[window : window + 1].to(self.device)
        logits_WV = self._skeleton.model(input_ids=ids_1W, use_cache=False).logits[0].float()
        self._skeleton.unload()  # embeddings and head are the largest parts of many models
        return logits_WV

    @torch.no_grad()
    def _embed(self) -> None:
        """Fill the hidden states before layer 0, and note what the model passes to each layer (masks, positions)."""
        vocabulary = self._skeleton.vocabulary
        if int(self.ids_NW.min()) < 0 or int(self.ids_NW.max()) >= vocabulary:
            raise InputError(
                f"token id {int(self.ids_NW.max())} lies outside the model's vocabulary of {vocabulary}",
                "the tokenizer belongs to another model",
            )
        self._skeleton.load_base()
        run = self._skeleton.model.base_model

        def note(layer: int) -> Callable[[Tensor, Passed], Tensor]:
            def seen(hidden_BWD: Tensor, passed: Passed) -> Tensor:
                self._passed[layer] = passed
                return hidden_BWD

            return seen

        def keep(batch: slice) -> Callable[[Tensor, Passed], Tensor]:
            def seen(hidden_BWD: Tensor, _passed: Passed) -> Tensor:
                self._hidden_NWD[batch].copy_(hidden_BWD)
                return hidden_BWD

            return seen

        # One window: what is passed then broadcasts over any number of them.
        for layer, stand_in in enumerate(self._skeleton.stand_ins):
            stand_in.seen = note(layer)
        run(input_ids=self.ids_NW[:1].to(self.device), use_cache=False)
        for stand_in in self._skeleton.stand_ins:
            stand_in.seen = None
        for batch in self._batches:
            self._skeleton.stand_ins[0].seen = keep(batch)
            run(input_ids=self.ids_NW[batch].to(self.device), use_cache=False)
        self._skeleton.stand_ins[0].seen = None
        self._skeleton.unload()

    def _stream_norms(self) -> Tensor | None:
        if self.anatomy.norm_after:
            return None
        norm_T = torch.cat([self._hidden_NWD[batch].float().norm(dim=-1).flatten() for batch in self._batches])
        return norm_T / self.anatomy.residual_multiplier

    def _run_to_ffn(self, module: nn.Module) -> None:
        """Run a layer whose FFNs are recorders on all windows, and keep its attention's output for :meth:`advance`."""
        attention, passed = _attention_of(module), self._passed[self.layer]
        kept_NWD = None if attention is None else self._buffer("attention", tuple(self._hidden_NWD.shape))
        for batch in self._batches:
            if attention is not None and kept_NWD is not None:
                attention.keep = kept_NWD[batch].copy_
            with contextlib.suppress(_AllSeen):
                module(self._hidden_NWD[batch].to(self.device), *passed.args, **passed.kwargs)
        if attention is not None:
            attention.keep = None
        self._attention_NWD = kept_NWD

    def _enter(self) -> nn.Module:
        if self.layer >= self.num_layers:
            raise RuntimeError(f"all {self.num_layers} layers are done")
        if self._module is None:
            self._module = self._skeleton.layer(self.layer, self._table)
        return self._module

    def _leave(self, layer: int) -> None:
        self._module = None
        self._attention_NWD = None
        self._table.clear()
        self._skeleton.unload()
        self.layer = layer

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A buffer of ``compute_dtype``, the same one every time; a mapped file without a name when it is large."""
        if name not in self._buffers:
            self._buffers[name] = self._room(shape, self.dtype)
        return self._buffers[name]

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory for numbers of all tokens, or a mapped file where they are many."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._spill is not None and nbytes > self._spill_bytes:
            return _mapped(self._spill, shape, dtype, nbytes)
        return torch.empty(shape, dtype=dtype)


def _attention_of(module: nn.Module) -> AttentionStandIn | None:
    return next((child for child in module.children() if isinstance(child, AttentionStandIn)), None)


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
    descriptor, name = tempfile.mkstemp(prefix="stream-", dir=folder)
    try:
        # Reserved, not sparse: a full disk must fail here and not as a bus error on some later write.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.truncate(descriptor, nbytes)
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    except OSError as error:
        raise ResourceError(
            f"no room for {nbytes / 1e9:.1f} GB of calibration buffers in {folder}: {error.strerror}",
            "free some disk or lower --calib-tokens",
        ) from error
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # where open files cannot be removed, the staging folder's clean-up does it
            Path(name).unlink()
