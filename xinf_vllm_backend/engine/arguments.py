"""Engine arguments as people give them, checked before vLLM computes with them."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import BadLaunchArgumentError

_SCALARS = frozenset({int, float, bool, str, type(None)})
_CONFIG = ConfigDict(coerce_numbers_to_str=True)


def check(engine_args: Any) -> None:
    """Give every number, switch and word of ``engine_args`` the type it is declared with, in place.

    vLLM compares some of them before it validates them, and a person would read about ``'<'``.

    Args:
        engine_args: a ``vllm.AsyncEngineArgs``.

    Raises:
        BadLaunchArgumentError: a value is of the wrong type.
    """
    for field in dataclasses.fields(engine_args):
        value = getattr(engine_args, field.name)
        hint = _hint(engine_args, field)
        if not _is_scalar(hint) or value == _default(field):
            continue
        try:
            checked = TypeAdapter(hint, config=_CONFIG).validate_python(value)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(item["msg"] for item in error.errors()))
            raise BadLaunchArgumentError(f"{field.name}={value!r} cannot be used: {wanted.lower()}.") from None
        setattr(engine_args, field.name, checked)


def _default(field: dataclasses.Field[Any]) -> Any:
    """What vLLM has where nothing is given; it may be a mark of another type, made by a factory, as in 0.29."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _hint(engine_args: Any, field: dataclasses.Field[Any]) -> Any:
    owner = next(cls for cls in type(engine_args).__mro__ if field.name in inspect.get_annotations(cls))
    alone = type("Alone", (), {"__annotations__": {field.name: field.type}})
    try:
        return typing.get_type_hints(alone, vars(sys.modules[owner.__module__]))[field.name]
    except NameError:  # a type that vLLM imports for type checkers only: none of the simple ones
        return None


def _is_scalar(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return all(map(_is_scalar, typing.get_args(hint)[: 1 if origin is typing.Annotated else None]))
    return origin is typing.Literal or (isinstance(hint, type) and hint in _SCALARS)
