"""Tiny random embedding and rerank models made on the spot, and Xinference's registration of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tiny_model import SPECIAL_TOKENS, make_tiny_model, write_tokenizer

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
ANSWERS = ("no", "yes")  # the tokens whose likelihood is the score of a reranker made of a model that generates text
# For content that is a list of parts, each image taking the place of one token.
CHATML_VISION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def make_tiny_vision(directory: Path, *, seed: int = 0) -> Path:
    """Write a random Qwen3-VL, whose arithmetic is float32, for embeddings and scores of images; needs torchvision.

    Xinference takes it for such by a name that begins with "Qwen3-VL-Embedding" or "Qwen3-VL-Reranker".
    """
    import torch
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    tokens = SPECIAL_TOKENS + VISION_TOKENS + ANSWERS
    vocabulary, _ = write_tokenizer(directory, tokens, CHATML_VISION)
    start, end, image, video = map(tokens.index, VISION_TOKENS)
    spread = 0.2  # of the weights
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
        "initializer_range": spread,
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": spread,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3VLForConditionalGeneration(config).float().save_pretrained(directory)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}),
        AutoTokenizer.from_pretrained(directory),
        Qwen3VLVideoProcessor(patch_size=16),
        chat_template=CHATML_VISION,
    )
    processor.save_pretrained(directory)
    return directory


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
