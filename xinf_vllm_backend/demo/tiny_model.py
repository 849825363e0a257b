"""Tiny random models made on the spot, and the Xinference registration for one or for a model of your own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same for content that is a list of parts, each clip taking the place of one token.
CHATML_AUDIO = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}",
)

# What the tokenizer learns its merges from, and so what the model's texts look like. The letters that take
# several bytes are here on purpose: a token may end within one.
_TEXT = """\
The keeper of the lighthouse wrote down every ship that passed, the hour, the wind and the colour of the sails.
In winter few came. He mended nets, read the same three books again and taught his dog to carry letters to the village.
One night a storm put out the lamp. He climbed the stairs with oil and a match: ninety steps, then ninety more.
Far out a small boat was waiting for the light. It had lost its mast, and nobody aboard could tell rocks from waves.
The lamp burned again before the hour was over, and the boat came in as if nothing had happened at all.
Since then he keeps a second lamp beside the first one, filled and trimmed, and a third in the cellar, just in case.
When people ask him why, he says that a light which fails once a year is worth less than a candle which never does.
Der Wärter schrieb jedes Schiff auf, das vorüberfuhr; nachts heulten die Stürme über die Dünen, und er blieb wach.
Le gardien répète à l'élève : « une lumière qui s'éteint ne sert à rien », et la mer s'élève près de la jetée.
灯塔的守护人每天记录过往的船只。夜里风暴来了,灯灭了,他又把灯点亮。船平安回来,好像什么都没有发生。
"""


def make_tiny_model(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Qwen2 of about 1 MB, with tokenizer and chat template, that vLLM loads on any device.

    The same seed gives the same model. Its greedy text is varied, and never ends by itself: no special token is ever
    the likeliest, so a request runs to its max_tokens.

    Args:
        directory: where to write; made if missing.
        seed: of the weights.
        overrides: entries of config.json to replace or add; sizes given here also shape the weights.

    Returns:
        ``directory``, absolute.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, unlikely = write_tokenizer(directory)
    config = {**_text_config(vocabulary), **overrides}
    _write_configs(directory, config, config)
    _write_weights(directory, _text_weights(config, unlikely, _Random(seed, config["initializer_range"])))
    return directory


def make_tiny_moe_model(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Qwen3-MoE of about 3 MB: eight experts in each layer, two for each token.

    On a CPU host vLLM runs it on one rank alone: its CPU build lacks the collectives of experts on several ranks.

    Args:
        directory: where to write; made if missing.
        seed: of the weights.
        overrides: as of :func:`make_tiny_model`.

    Returns:
        ``directory``, absolute.
    """
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "attention_bias": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return make_tiny_model(directory, seed=seed, **{**experts, **overrides})


def make_tiny_multimodal_model(directory: Path, *, seed: int = 0) -> Path:
    """Write a random Qwen2-Audio of about 1.5 MB: it hears, and talks like the model of :func:`make_tiny_model`.

    Audio, because of the models that Xinference gives to vLLM every one that sees needs torchvision, which a CPU
    environment cannot have. A clip of 30 s takes 750 tokens. Xinference reads clips through ``qwen_omni_utils``, which
    needs torchvision too; a module of that name with a ``process_audio_info`` is enough.

    Args:
        directory: where to write; made if missing.
        seed: of the weights.

    Returns:
        ``directory``, absolute.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, unlikely = write_tokenizer(directory, SPECIAL_TOKENS + AUDIO_TOKENS, CHATML_AUDIO)
    text = _text_config(vocabulary)
    audio: dict[str, Any] = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 16,
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "max_source_positions": 1500,  # of 20 ms each: the 30 s that a clip is padded to
        "activation_function": "gelu",
    }
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": audio,
        "text_config": text,
        "audio_token_index": len(SPECIAL_TOKENS),
        "torch_dtype": "bfloat16",
    }
    _write_configs(directory, config, text)
    _write_json(
        directory / "preprocessor_config.json",
        {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "Qwen2AudioProcessor",
            "feature_size": audio["num_mel_bins"],
            "sampling_rate": 16000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": 30,
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    )
    random = _Random(seed, text["initializer_range"])
    weights = {f"language_model.{name}": weight for name, weight in _text_weights(text, unlikely, random).items()}
    weights |= {f"audio_tower.{name}": weight for name, weight in _audio_weights(audio, random).items()}
    weights["multi_modal_projector.linear.weight"] = random(text["hidden_size"], audio["d_model"])
    weights["multi_modal_projector.linear.bias"] = random(text["hidden_size"])
    _write_weights(directory, weights)
    return directory


def make_tiny_lora(directory: Path, model: Path, *, seed: int = 0) -> Path:
    """Write a random LoRA adapter of rank 8 for the query projections of a model of :func:`make_tiny_model`.

    Args:
        directory: where to write; made if missing.
        model: directory of the model.
        seed: of the weights.

    Returns:
        ``directory``, absolute.
    """
    import torch
    from safetensors.torch import save_file

    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(8, config["hidden_size"], generator=draw)
        tensors[f"{name}_B.weight"] = torch.randn(config["hidden_size"], 8, generator=draw)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    _write_json(directory / "adapter_config.json", settings)
    return directory


def model_registration(
    name: str, path: Path, abilities: Sequence[str] = ("chat", "generate"), *, model_family: str | None = None
) -> dict[str, Any]:
    """The definition of a custom LLM on this host's disk, as ``xinference register`` and its REST API take it.

    Context length, architectures and chat template are read from the model's own files; a model without a template
    gets ChatML.

    Args:
        name: the name to launch it by.
        path: the model's directory.
        abilities: what it is to be offered for.
        model_family: one of Xinference's own families, to have its tool calls parsed like that family's.

    Raises:
        ValueError: ``path`` holds no config.json.
    """
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model directory: it holds no config.json")
    config = json.loads((path / "config.json").read_text())
    text_config = config.get("text_config", config)  # multimodal models keep the language model's numbers there
    return {
        "version": 2,
        "model_name": name,
        "model_description": f"the model in {path}",
        "model_family": model_family or name,
        "model_lang": ["en"],
        "model_ability": list(abilities),
        "context_length": int(text_config.get("max_position_embeddings", 2048)),
        "architectures": config.get("architectures"),
        "chat_template": _chat_template(path),
        # vLLM stops at the end tokens of generation_config.json by itself.
        "stop_token_ids": [],
        "stop": [],
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": 1,
                "quantization": "none",
                "model_id": None,
                "model_uri": str(path),
            }
        ],
    }


def _chat_template(path: Path) -> str:
    """The model's own chat template, from either of the two places where it may be; ChatML if it has none."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text()
    tokenizer_config = path / "tokenizer_config.json"
    template = json.loads(tokenizer_config.read_text()).get("chat_template") if tokenizer_config.is_file() else None
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template or CHATML


def _text_config(vocabulary: int) -> dict[str, Any]:
    """config.json of the tiny Qwen2."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,  # heads of 32, the smallest that vLLM's CPU attention takes
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        # Tied embeddings or small weights make the greedy text collapse into one token, which would hide lost ones.
        "tie_word_embeddings": False,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _write_configs(directory: Path, config: dict[str, Any], text_config: dict[str, Any]) -> None:
    _write_json(directory / "config.json", config)
    end = {name: text_config[name] for name in ("eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", end)


def write_tokenizer(
    directory: Path, special_tokens: Sequence[str] = SPECIAL_TOKENS, chat_template: str = CHATML
) -> tuple[int, list[int]]:
    """Train a byte-level BPE tokenizer on the built-in text, and write it into ``directory``.

    Returns:
        Its size, and the ids that no text should hold: the special tokens and the bytes that the built-in text lacks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens, so that it takes any prompt.
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(special_tokens),
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
    )
    bytes_of_text = {byte for piece, _ in split.pre_tokenize_str(_TEXT) for byte in piece}
    unlikely = [
        number
        for token, number in tokenizer.get_vocab().items()
        if token in special_tokens or (len(token) == 1 and token not in bytes_of_text)
    ]
    return tokenizer.get_vocab_size(), unlikely


class _Random:
    """Normally distributed bf16 tensors of a given spread, the same for the same seed."""

    def __init__(self, seed: int, spread: float) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        self._spread = spread

    def __call__(self, *shape: int) -> torch.Tensor:
        import torch

        return (torch.randn(*shape, generator=self._generator) * self._spread).to(torch.bfloat16)


def _text_weights(config: dict[str, Any], unlikely: list[int], random: _Random) -> dict[str, torch.Tensor]:
    """The weights of a tiny Qwen2 or Qwen3-MoE, under which the ``unlikely`` tokens never come first."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    weights = {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": _ones(hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, count in heads.items():
            weights[f"{layer}.self_attn.{name}_proj.weight"] = random(count * head, hidden)
            if config.get("attention_bias", True):
                weights[f"{layer}.self_attn.{name}_proj.bias"] = random(count * head)
        weights[f"{layer}.self_attn.o_proj.weight"] = random(hidden, hidden)
        weights |= {f"{layer}.mlp.{name}": weight for name, weight in _mlp_weights(config, random).items()}
        if config["model_type"] == "qwen3_moe":
            weights |= {f"{layer}.self_attn.{name}_norm.weight": _ones(head) for name in ("q", "k")}
        weights[f"{layer}.input_layernorm.weight"] = _ones(hidden)
        weights[f"{layer}.post_attention_layernorm.weight"] = _ones(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = random(vocabulary, hidden)
        weights["lm_head.weight"][unlikely] = 0  # a logit of 0, where the best of the others is far above
    return weights


def _mlp_weights(config: dict[str, Any], random: _Random) -> dict[str, torch.Tensor]:
    """Those of one layer: of an MLP, or of a gate and its experts."""
    hidden = config["hidden_size"]
    if config["model_type"] != "qwen3_moe":
        return _gated_weights("", hidden, config["intermediate_size"], random)
    weights = {"gate.weight": random(config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        weights |= _gated_weights(f"experts.{expert}.", hidden, config["moe_intermediate_size"], random)
    return weights


def _gated_weights(prefix: str, hidden: int, inner: int, random: _Random) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}gate_proj.weight": random(inner, hidden),
        f"{prefix}up_proj.weight": random(inner, hidden),
        f"{prefix}down_proj.weight": random(hidden, inner),
    }


def _audio_weights(config: dict[str, Any], random: _Random) -> dict[str, torch.Tensor]:
    """The weights of Qwen2-Audio's encoder, which is Whisper's."""
    width, inner = config["d_model"], config["encoder_ffn_dim"]
    weights = {
        "conv1.weight": random(width, config["num_mel_bins"], 3),
        "conv1.bias": random(width),
        "conv2.weight": random(width, width, 3),
        "conv2.bias": random(width),
        "embed_positions.weight": random(config["max_source_positions"], width),
        "layer_norm.weight": _ones(width),
        "layer_norm.bias": random(width),
    }
    for index in range(config["encoder_layers"]):
        layer = f"layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights[f"{layer}.self_attn.{name}.weight"] = random(width, width)
            if name != "k_proj":
                weights[f"{layer}.self_attn.{name}.bias"] = random(width)
        weights[f"{layer}.fc1.weight"], weights[f"{layer}.fc1.bias"] = random(inner, width), random(inner)
        weights[f"{layer}.fc2.weight"], weights[f"{layer}.fc2.bias"] = random(width, inner), random(width)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights[f"{layer}.{name}.weight"], weights[f"{layer}.{name}.bias"] = _ones(width), random(width)
    return weights


def _ones(size: int) -> torch.Tensor:
    import torch

    return torch.ones(size, dtype=torch.bfloat16)


def _write_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
