"""The metadata that describe the architecture, each to be used once: what nobody asks for is refused by name."""

from __future__ import annotations

from typing import Any

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.gguf_input.header import Header

_REQUIRED = object()


class Keys:
    """The keys ``ARCHITECTURE.*`` of a header. llama.cpp reads a model's function from no others.

    ``general.*``, ``tokenizer.*``, ``split.*``, ``quantize.*`` and those of other tools say where a model comes from,
    how it was packed and how it reads text.
    """

    def __init__(self, header: Header) -> None:
        self.file = header.file
        self.prefix = f"{header.architecture}."
        self._left = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number of at least 1. Raises CheckpointError for anything else, or when a needed key is missing."""
        value = self._take(name, default)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._odd(name, value, "a positive whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number. Raises CheckpointError like :meth:`size`."""
        value = self._take(name, default)
        if value is default and default is not _REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._odd(name, value, "a number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        """A text. Raises CheckpointError for anything else."""
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self._odd(name, value, "a text")
        return value

    def expect(self, name: str, wanted: Any, why: str) -> None:
        """Take a key that may only have one value, if it is there. Raises UnsupportedModelError."""
        value = self._take(name, wanted)
        if value != wanted:
            raise UnsupportedModelError(
                f"{self.file} has {self.prefix}{name} = {value!r}: {why}",
                "convert the original checkpoint in place of the GGUF",
            )

    def ignore(self, *names: str) -> None:
        """Keys that change nothing of the function."""
        for name in names:
            self._left.pop(name, None)

    def check_used(self, model_type: str) -> None:
        """Raise UnsupportedModelError for keys that nobody took."""
        if self._left:
            named = ", ".join(f"{self.prefix}{name}" for name in sorted(self._left))
            raise UnsupportedModelError(
                f"{self.file} has what a {model_type} checkpoint would lose: {named}",
                "convert the original checkpoint in place of the GGUF",
            )

    def _take(self, name: str, default: Any) -> Any:
        if name not in self._left:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.file} lacks the key {self.prefix}{name}", "download it again")
            return default
        value = self._left.pop(name)
        if isinstance(value, list) and value:
            # One value per layer, or one per layer and all alike.
            if any(entry != value[0] for entry in value):
                raise UnsupportedModelError(
                    f"{self.file} has a {self.prefix}{name} for each layer, which a checkpoint cannot say",
                    "convert the original checkpoint in place of the GGUF",
                )
            return value[0]
        return value

    def _odd(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file} is damaged: {self.prefix}{name} is {value!r}, not {wanted}", "download it again"
        )
