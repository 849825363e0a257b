"""LoRA adapters of an engine that is restarted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from streams import WORKER, Gate, MakeWatched, Stream, until, victim

pytestmark = pytest.mark.engine


def make_lora(directory: Path, model: Path) -> Path:
    """Write a random LoRA adapter of rank 8 for the query projections of ``model``."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(8, hidden, generator=draw)
        tensors[f"{name}_B.weight"] = torch.randn(hidden, 8, generator=draw)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


async def test_a_lora_that_was_added_to_a_running_engine_is_there_after_its_death(
    make_watched: MakeWatched, tiny_model: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    supervisor = await make_watched(enable_lora=True, max_lora_rank=8, dtype="float32")  # prefill rounds as decode does
    lora = LoRARequest("extra", 1, str(make_lora(tmp_path / "lora", tiny_model)))
    assert await supervisor.add_lora(lora)
    plain = Stream(supervisor)
    await plain.end()  # not at once: on a CPU vLLM may apply an adapter to all of a mixed batch
    before = Stream(supervisor, lora=lora)
    await before.end()
    gate = Gate(tmp_path / "gate")
    after = Stream(supervisor, lora=lora, **gate.params)
    await gate.reached(after)
    os.kill(victim(supervisor, WORKER), signal.SIGKILL)
    gate.open()
    await after.end()
    assert after.told == before.told
    assert after.told != plain.told
    await until(lambda: supervisor.restarts == 1)
    assert set(await supervisor.list_loras()) == {1}
