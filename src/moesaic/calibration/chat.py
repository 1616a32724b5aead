"""From the messages of a conversation to text: by the model's chat template, as it was trained to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moesaic.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

# ShareGPT's names of the roles -> those of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}


def is_messages(value: Any) -> bool:
    """Whether ``value`` is a conversation: messages with ``role`` and ``content``, or with ``from`` and ``value``."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and bool(value)
        and all(isinstance(entry, Mapping) and ({"role", "from"} & entry.keys()) for entry in value)
    )


def chat_text(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation as the model's chat template writes it.

    A model without a template was not trained on one: its text is what the messages say, joined by blank lines.

    Raises:
        InputError: The template refuses the messages.
    """
    plain = [_plain(message) for message in messages]
    if not tokenizer.chat_template:
        return "\n\n".join(str(message["content"]) for message in plain if message.get("content"))
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"the model's chat template refuses the messages: {reason}",
            "leave such records out, or name a field of plain text: FILE:FIELD",
        ) from error
    return str(text)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message under the names that templates use, its parts of text joined; nulls, which tables fill in, left out."""
    found = {key: value for key, value in message.items() if value is not None}
    if "role" not in found:
        role = str(found.pop("from", "user"))
        found["role"] = _ROLES.get(role, role)
    if "content" not in found and "value" in found:
        found["content"] = found.pop("value")
    content = found.setdefault("content", "")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            found["content"] = "".join(map(str, texts))
    return found
