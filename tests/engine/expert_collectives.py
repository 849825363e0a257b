"""What vLLM's CPU build lacks for experts on several ranks: a general plugin of vLLM, for tests alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

ENTRY_POINT = "[vllm.general_plugins]\nexpert_collectives = expert_collectives:supply\n"


def supply() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

    torch.cpu._is_amx_tile_supported = lambda: False  # on hosts with AMX vLLM refuses experts in float32
    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    for name in ("forward_grouped_gemm", "forward_torch"):
        forward = getattr(CPUFusedMOE, name)
        if not hasattr(forward, "__wrapped__"):
            setattr(CPUFusedMOE, name, by_local_experts(forward))


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    assert dim == 0
    if not isinstance(input_, torch.Tensor):
        return [all_gatherv(self, each, dim, sizes) for each in input_]
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    assert dim == 0
    total = input_.contiguous()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes or len(total) // self.world_size)[self.rank_in_group].contiguous()


def by_local_experts(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``forward`` for a rank that has some of the experts: vLLM's own takes the numbers of all for those of its own."""

    @functools.wraps(forward)
    def by_local(
        self: Any,
        layer: Any,
        input_: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: Any,
        experts: int = -1,
        *rest: Any,
    ) -> torch.Tensor:
        if layer.expert_map is not None:
            local = layer.expert_map[ids.long()]
            weights, ids = weights * (local >= 0), local.clamp(min=0).to(ids.dtype)
            experts = int((layer.expert_map >= 0).sum())
        return forward(self, layer, input_, weights, ids, activation, experts, *rest)

    return by_local
