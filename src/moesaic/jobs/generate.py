"""Text from a model: one answer, or a talk; with the folder's chat template where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.checkpoint.loading import GENERATION, load_model, prefill_as_loaded
from moesaic.checkpoint.reader import Checkpoint, read_json
from moesaic.checkpoint.source import resolve_model
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import CheckpointError, InputError

Message = Mapping[str, str]
"""``role`` and ``content``, as chat templates take them."""


@dataclass(frozen=True)
class Reply:
    """What a model said, of how many tokens, and in how many seconds, its reading of the prompt included."""

    text: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Speaker:
    """A model that answers.

    Args:
        model: Folder, .gguf file or hub id; dense or converted.
        plain: Continue the text as it is, without the chat template.

    Raises InputError or CheckpointError where it cannot be loaded.
    """

    def __init__(self, model: str | Path, *, plain: bool = False) -> None:
        folder = Checkpoint(resolve_model(str(model))).folder
        self._tokenizer: Any = load_tokenizer(folder)
        self._model = load_model(folder, "auto")
        self._ends = _ends(folder, self._tokenizer)
        self.chats = not plain and bool(getattr(self._tokenizer, "chat_template", None))

    def reply(
        self,
        said: Sequence[Message],
        *,
        tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        hear: Callable[[str], None] | None = None,
    ) -> Reply:
        """The answer to what was said.

        Args:
            said: Messages in turn, the last one the user's. Without a chat template their texts are joined by lines.
            tokens: Most tokens of the answer.
            temperature: 0 takes the likeliest token each time, else tokens are drawn.
            seed: Of the drawing.
            hear: Receives the text while it comes.

        Raises InputError for an empty prompt.
        """
        import torch

        ids = self._encode(said)
        start = ids["input_ids"].shape[1]
        options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens, "eos_token_id": self._ends}
        if temperature > 0:
            options["temperature"] = temperature
        options["pad_token_id"] = self._tokenizer.pad_token_id if self._ends is None else self._ends[0]
        torch.manual_seed(seed)
        began = time.perf_counter()
        with prefill_as_loaded(self._model), torch.inference_mode():
            out = self._model.generate(**ids, **options, streamer=_streamer(self._tokenizer, hear))
        seconds = time.perf_counter() - began
        new = out[0, start:]
        return Reply(self._tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)

    def _encode(self, said: Sequence[Message]) -> Any:
        if not said or not said[-1]["content"].strip():
            raise InputError("the prompt is empty", "write some words")
        if self.chats:
            return self._tokenizer.apply_chat_template(
                list(said), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return self._tokenizer("\n".join(message["content"] for message in said), return_tensors="pt")


def _streamer(tokenizer: Any, hear: Callable[[str], None] | None) -> Any:
    if hear is None:
        return None
    from transformers import TextStreamer

    class _Heard(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            hear(text)

    return _Heard(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _ends(folder: Path, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: those of the folder's generation settings, else the tokenizer's."""
    try:
        found = read_json(folder / GENERATION).get("eos_token_id") if (folder / GENERATION).exists() else None
    except CheckpointError:  # loading leaves damaged ones unread too
        found = None
    found = tokenizer.eos_token_id if found is None else found
    return None if found is None else [found] if isinstance(found, int) else list(found)
