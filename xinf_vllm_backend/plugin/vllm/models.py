"""The classes behind the engine name "vLLM": Xinference's own, hosted by us. No logic of their own.

Xinference's virtualenv mode picks a class by the words "chat" and "multi" in its name: keep them.
"""

from __future__ import annotations

from xinference.model.llm.vllm.core import VLLMChatModel, VLLMModel, VLLMMultiModel

from ..check import vllm_check
from ..host import HostedModel
from ..hosted import undecorated
from ..parsed import ParsedChats, as_it_comes, parsed
from ..push.model_side import pushed
from ..request_arguments import lora_checked


class HostedVLLMModel(HostedModel):
    async_generate = pushed(vllm_check(lora_checked(undecorated(VLLMModel.async_generate))))


class HostedVLLMChatModel(ParsedChats, HostedModel, VLLMChatModel):
    async_generate = pushed(vllm_check(lora_checked(as_it_comes(undecorated(VLLMChatModel.async_generate)))))
    async_chat = pushed(vllm_check(parsed(undecorated(VLLMChatModel.async_chat))))


class HostedVLLMMultiModel(ParsedChats, HostedModel, VLLMMultiModel):
    async_generate = pushed(vllm_check(lora_checked(as_it_comes(undecorated(VLLMMultiModel.async_generate)))))
    async_chat = pushed(vllm_check(parsed(undecorated(VLLMMultiModel.async_chat))))


# Chat before base, so that a model that can chat and generate gets the class that can do both.
CLASSES = (HostedVLLMChatModel, HostedVLLMMultiModel, HostedVLLMModel)
