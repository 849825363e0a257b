"""Tiny random embedding and rerank models made on the spot, and Xinference's registration of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tiny_model import SPECIAL_TOKENS, make_tiny_model, write_tokenizer


def make_tiny_encoder(directory: Path, *, seed: int = 0, scores: bool = False, **overrides: Any) -> Path:
    """Write a random BERT of about 1 MB, whose arithmetic is float32: an embedding model, or a cross-encoder.

    Args:
        directory: where to write; made if missing.
        seed: of the weights.
        scores: whether it is a cross-encoder, which gives a pair of texts one score.
        overrides: entries of config.json to replace or add; sizes given here also shape the weights.

    Returns:
        ``directory``, absolute.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, _ = write_tokenizer(directory)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "num_labels": 1 if scores else 2,
    }
    config = BertConfig(**{**sizes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (BertForSequenceClassification if scores else BertModel)(config)
    model.save_pretrained(directory)
    return directory


def make_tiny_decoder(directory: Path, *, seed: int = 0) -> Path:
    """Write the tiny random Qwen2 of :func:`.make_tiny_model` as a model that embeds, as most larger ones are.

    Xinference gives it an ``LLM`` as a rerank model, and so as one whose name begins with "Qwen3-VL-Embedding".
    """
    return make_tiny_model(directory, seed=seed, architectures=["Qwen2Model"], torch_dtype="float32")


def embedding_registration(name: str, path: Path, dimensions: int = 128) -> dict[str, Any]:
    """The definition of a custom embedding model on this host's disk, as ``xinference register`` takes it.

    Args:
        name: the name to launch it by; Xinference offers vLLM by its first part, such as "bge".
        path: the model's directory.
        dimensions: of its vectors.
    """
    return {
        "version": 2,
        "model_name": name,
        "dimensions": dimensions,
        "max_tokens": 512,
        "language": ["en"],
        "model_specs": [_spec(path)],
    }


def rerank_registration(name: str, path: Path) -> dict[str, Any]:
    """The definition of a custom rerank model, likewise."""
    return {
        "version": 2,
        "model_name": name,
        "type": "normal",
        "max_tokens": 512,
        "language": ["en"],
        "model_specs": [_spec(path)],
    }


def _spec(path: Path) -> dict[str, Any]:
    return {
        "model_format": "pytorch",
        "model_hub": "huggingface",
        "model_id": None,
        "model_revision": None,
        "model_uri": str(path.resolve()),
        "quantization": "none",
    }
