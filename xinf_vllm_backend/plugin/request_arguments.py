"""What a request asks for, where Xinference would answer something else than was asked."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..errors import BadRequestError

Generate = Callable[..., Awaitable[Any]]


def lora_checked(generate: Generate) -> Generate:
    """Wrap ``async_generate`` of a model: a request that names an unknown LoRA is refused."""

    @functools.wraps(generate)
    async def checked(self: Any, prompt: Any, generate_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted = (generate_config or {}).get("lora_name")
        if wanted is not None:
            check_lora(wanted, [lora.lora_name for lora in self.lora_requests])
        return await generate(self, prompt, generate_config, *args, **kwargs)

    return checked


def check_lora(wanted: str, known: Sequence[str]) -> None:
    """Refuse a LoRA that the model does not have; Xinference would answer from the base model.

    Raises:
        BadRequestError: ``wanted`` is not in ``known``.
    """
    if wanted not in known:
        raise BadRequestError(f"There is no LoRA {wanted!r}; the model has {', '.join(known) or 'none'}.")


def check_guided_json(schema: Any) -> None:
    """Refuse a ``guided_json`` that is no schema; Xinference would answer without the constraint.

    Raises:
        BadRequestError: it is neither an object, nor text, nor None.
    """
    if not isinstance(schema, (str, dict, type(None))):
        raise BadRequestError("guided_json must be a JSON schema, as an object or as text.")
