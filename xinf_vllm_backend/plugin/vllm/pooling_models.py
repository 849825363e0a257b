"""The embedding and rerank classes behind the engine name "vllm": Xinference's own, hosted by us."""

from __future__ import annotations

from xinference.model.embedding.vllm.core import VLLMEmbeddingModel
from xinference.model.rerank.vllm.core import VLLMRerankModel

from ..check import vllm_check
from ..pooling import HostedPoolingModel


class HostedVLLMEmbeddingModel(HostedPoolingModel, VLLMEmbeddingModel):
    _served_by = "create_embedding"
    _async_create_embedding = vllm_check(VLLMEmbeddingModel._async_create_embedding)


class HostedVLLMRerankModel(HostedPoolingModel, VLLMRerankModel):
    _served_by = "rerank"
    _async_rerank = vllm_check(VLLMRerankModel._async_rerank)


EMBEDDING_CLASSES = (HostedVLLMEmbeddingModel,)
RERANK_CLASSES = (HostedVLLMRerankModel,)
