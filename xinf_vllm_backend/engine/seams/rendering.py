"""From a prompt to what EngineCore is asked: AsyncLLM does it for each by itself, on a thread."""

from __future__ import annotations

import importlib
from typing import Any

from .seam import Seam

RENDER = Seam(
    "vllm.renderers.base",
    "BaseRenderer.render_cmpl",
    "tokenizing the texts of pooling requests together",
    "each takes its own way to a thread and back",
)
PARSE = Seam("vllm.renderers.inputs.preprocess", "parse_model_prompt", RENDER.used_for, RENDER.without)


def present() -> bool:
    return RENDER.present() and PARSE.present()


def is_text(prompt: Any) -> bool:
    """Whether ``prompt`` has yet to be tokenized, and holds nothing but text."""
    return isinstance(prompt, str) or (isinstance(prompt, dict) and prompt.keys() == {"prompt"})


def is_tokenized(prompt: Any) -> bool:
    """Whether ``prompt`` holds nothing but tokens, so that :func:`render` only looks at how many they are."""
    return isinstance(prompt, dict) and prompt.keys() <= {"prompt", "prompt_token_ids"} and "prompt_token_ids" in prompt


def render(engine: Any, prompt: Any) -> Any:
    """What ``engine``, an AsyncLLM, takes in place of ``prompt``, and makes of it otherwise.

    Raises:
        Exception: ``prompt`` is bad.
    """
    parse = importlib.import_module(PARSE.module).parse_model_prompt
    (rendered,) = engine.renderer.render_cmpl([parse(engine.model_config, prompt)])
    return rendered


def threads(engine: Any) -> int:
    """How many threads ``engine`` would use: ``renderer_num_workers``."""
    return getattr(engine.model_config, "renderer_num_workers", 1)
