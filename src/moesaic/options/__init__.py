"""What an option is: a field of a config, which a flag, ``--set``, a settings file or Python gives. No torch here.

Every field is an option of the command line, but for those made by :func:`study`: they vary something that benchmarks
and studies look at, and would only be in the way of somebody who converts a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import shorten
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from moesaic.errors import InputError

Model = TypeVar("Model", bound=BaseModel)

_INSTEAD = "instead_of_set"
_LONGEST_HINT = 150


def study(*, instead: str = "", **rules: Any) -> Any:
    """A pydantic ``Field`` that ``--set`` does not take and ``moesaic methods`` does not list.

    Args:
        instead: The flag that sets it on the command line. Without one, settings files and Python alone do.
        rules: As ``Field`` takes them.
    """
    return Field(json_schema_extra={_INSTEAD: instead}, **rules)


def settable(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of all that ``--set`` takes: the fields of ``model`` and of models in it, no studies."""
    for name, field in model.model_fields.items():
        if _instead(field) is not None:
            continue
        inner = _model_in(field)
        if inner is None or field.annotation is not inner:  # ``null`` is a value, and leaves the section out
            yield f"{prefix}{name}", field
        if inner is not None:
            yield from settable(inner, f"{prefix}{name}.")


def refuse_studies(model: type[BaseModel], values: Mapping[str, Any], what: str, how: str) -> None:
    """Refuse what ``--set`` gives and may not.

    Args:
        model: What ``values`` become; keys that it does not know are left to :func:`build`.
        values: As given, sections nested.
        what: Whose options they are, for the message.
        how: The argument in Python that takes them, with ``{}`` for the option.

    Raises:
        InputError: naming the option, and where else it is given.
    """
    for name, value in _leaves(values):
        inner: type[BaseModel] | None = model
        for part in name.split("."):
            field = None if inner is None else inner.model_fields.get(part)
            if field is None:
                break
            if (instead := _instead(field)) is not None:
                python = how.format(_nested(name, value))
                there = f"give {instead}" if instead else f"in Python {python}; or a settings file, with --config"
                raise InputError(f"{what}: --set does not take {name}", there)
            inner = _model_in(field)


def build(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Validate ``values`` as ``model``; pydantic's report becomes one line, and a hint: the known keys, or what the
    option is."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or what
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, first["loc"][:-1])
            raise InputError(f"{what} has no option {where!r}", f"known: {', '.join(known)}") from error
        reason = f"{what}: {where}: {first['msg'].removeprefix('Value error, ')}"
        raise InputError(reason, _meaning(model, first["loc"])) from error


def _meaning(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """What the option at ``path`` is, for a hint: its description, in short, and its default."""
    name, field = _field_at(model, path)
    if field is None:
        return f"known: {', '.join(model.model_fields)}"
    text = field.description or ""
    while len(text) > _LONGEST_HINT and ". " in text:
        text = text.rpartition(". ")[0] + "."
    text = shorten(text, _LONGEST_HINT, placeholder=" ...")
    simple = isinstance(field.default, bool | int | float | str)
    return f"{name}: {text}" + (f" Default: {field.default}." if simple else "")


def _field_at(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[str, FieldInfo | None]:
    """The last field on ``path`` that a model knows; positions in a list, and words of pydantic's own, are passed."""
    found: tuple[str, FieldInfo | None] = ("", None)
    inner: type[BaseModel] | None = model
    for part in path:
        if inner is not None and (field := inner.model_fields.get(str(part))) is not None:
            found, inner = (str(part), field), _model_in(field)
    return found


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings. Raises InputError where a section holds something else."""
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"cannot set {name}: {section} holds no mapping", "write e.g. --set lora.rank=16")
    values[last] = value


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names that the model nested at ``path`` knows; those of ``model`` where no model is found there."""
    inner = model
    for part in path:
        field = inner.model_fields.get(str(part))
        if field is None:
            return list(inner.model_fields)
        inner = _model_in(field) or inner
    return list(inner.model_fields)


def _model_in(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, perhaps beside None."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _instead(field: FieldInfo) -> str | None:
    """The flag of a study, or ""; None for what ``--set`` takes."""
    extra = field.json_schema_extra
    return str(extra[_INSTEAD]) if isinstance(extra, dict) and _INSTEAD in extra else None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(name: str, value: Any) -> str:
    """``a.b`` and 1 -> ``{'a': {'b': 1}}``."""
    found: dict[str, Any] = {}
    put(found, name, value)
    return repr(found)
