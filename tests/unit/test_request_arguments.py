"""What a request asks for, where Xinference would answer something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.errors import BadRequestError
from xinf_vllm_backend.plugin.request_arguments import check_guided_json, lora_checked


class Model:
    def __init__(self, *loras: str) -> None:
        self.lora_requests = [SimpleNamespace(lora_name=lora) for lora in loras]

    @lora_checked
    async def async_generate(self, prompt: str, generate_config: Any = None, tools: Any = False, **kwargs: Any) -> Any:
        return prompt, generate_config, tools, kwargs


@pytest.mark.parametrize("config", [None, {}, {"lora_name": None}, {"lora_name": "mine"}])
async def test_a_request_that_names_no_lora_or_a_known_one_goes_on_as_it_is(config: Any) -> None:
    model = Model("mine", "other")
    asked = await model.async_generate("Hello", config, True, request_id="r-7")
    assert asked == ("Hello", config, True, {"request_id": "r-7"})
    assert await model.async_generate("Hello", generate_config=config) == ("Hello", config, False, {})


async def test_a_request_that_names_an_unknown_lora_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadRequestError, match="There is no LoRA 'nobody'; the model has mine, other"):
        await Model("mine", "other").async_generate("Hello", {"lora_name": "nobody"})
    with pytest.raises(BadRequestError, match="the model has none"):
        await Model().async_generate("Hello", {"lora_name": "nobody"})


@pytest.mark.parametrize("schema", [None, {}, {"type": "object"}, '{"type": "object"}'])
def test_a_schema_is_taken(schema: Any) -> None:
    check_guided_json(schema)


@pytest.mark.parametrize("schema", [True, 1, ["type"]])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(BadRequestError, match="guided_json must be a JSON schema"):
        check_guided_json(schema)
