"""Puts our classes behind the engine name "vLLM", in Xinference's tables of engines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def install() -> None:
    """Make "vLLM" mean our classes in this process, for chat, embedding and rerank models; idempotent.

    Xinference's engine hooks run before any extension is loaded, so the class lists are changed in place and the tables
    made from them are rebuilt. A catalog refresh appends Xinference's own classes after ours, and the first match wins.
    """
    from xinference.model import embedding, llm, rerank
    from xinference.model.embedding import embed_family
    from xinference.model.llm import llm_family
    from xinference.model.llm.custom import get_user_defined_llm_families
    from xinference.model.rerank import rerank_family

    from .vllm.models import CLASSES
    from .vllm.pooling_models import EMBEDDING_CLASSES, RERANK_CLASSES

    _put(
        CLASSES,
        llm_family.VLLM_CLASSES,
        llm_family.LLM_ENGINES,
        (*llm_family.BUILTIN_LLM_FAMILIES, *get_user_defined_llm_families()),
        llm.generate_engine_config_by_model_family,
    )
    _put(
        EMBEDDING_CLASSES,
        embed_family.VLLM_CLASSES,
        embed_family.EMBEDDING_ENGINES,
        (*_flat(embed_family.BUILTIN_EMBEDDING_MODELS), *embedding.get_user_defined_embeddings()),
        embedding.generate_engine_config_by_model_name,
    )
    _put(
        RERANK_CLASSES,
        rerank_family.VLLM_CLASSES,
        rerank_family.RERANK_ENGINES,
        (*_flat(rerank_family.BUILTIN_RERANK_MODELS), *rerank.get_user_defined_reranks()),
        rerank.generate_engine_config_by_model_name,
    )


def _flat(families: Mapping[str, Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(families.values()))


def _put(
    ours: tuple[type, ...],
    classes: list[type],
    engines: dict[str, Any],
    families: Iterable[Any],
    generate: Callable[[Any, dict[str, Any]], None],
) -> None:
    """Put ``ours`` in the place of ``classes``, and make ``engines``, by name of the model, again."""
    if tuple(classes[: len(ours)]) == ours:
        return
    classes[:] = ours
    made: dict[str, Any] = {}
    for family in families:
        generate(family, made)
    engines.clear()
    engines.update(made)
