"""What is looked at before a zygote forks; real zygotes are for tests/process."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest

from xinf_vllm_backend.engine import preload


class TestHazard:
    @pytest.fixture
    def torch(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What torch.cuda has; nothing is initialised."""
        module = ModuleType("torch.cuda")
        for name in ("is_initialized", "_is_in_bad_fork"):
            monkeypatch.setitem(module.__dict__, name, lambda: False)
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
        monkeypatch.setitem(sys.modules, "torch.cuda", module)
        return module.__dict__

    def test_the_look_for_hazards_imports_nothing_and_starts_no_thread(self, torch: dict[str, Any]) -> None:
        before = set(sys.modules), threading.active_count()
        assert preload.hazard() is None
        assert (set(sys.modules), threading.active_count()) == before

    def test_the_forked_child_of_a_process_that_had_initialised_torch_is_a_hazard(self, torch: dict[str, Any]) -> None:
        """As in a zygote that was forked itself: torch denies there that it is initialised."""
        torch["_is_in_bad_fork"] = lambda: True
        assert preload.hazard() == "torch.cuda was initialised before the fork"

    @pytest.mark.parametrize(("value", "hazardous"), [("1", True), ("0", False), ("", False)])
    def test_compatibility_libraries_of_cuda_are_a_hazard(
        self, monkeypatch: pytest.MonkeyPatch, value: str, hazardous: bool
    ) -> None:
        monkeypatch.setenv("VLLM_ENABLE_CUDA_COMPATIBILITY", value)
        assert (preload.hazard() is not None) is hazardous
