"""How a process ended, in words."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from xinf_vllm_backend.process import exits
from xinf_vllm_backend.process.exits import describe_exit


class TestDescribeExit:
    @pytest.fixture
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        memory = SimpleNamespace(total=100, available=90)
        monkeypatch.setattr(exits.psutil, "virtual_memory", lambda: memory)
        return memory

    @pytest.mark.parametrize("status", [0, 1, 3])
    def test_an_exit_is_described_by_its_status(self, status: int) -> None:
        assert describe_exit("EngineCore", 12, status) == f"EngineCore (pid 12) exited with status {status}"

    @pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
    def test_an_end_by_a_signal_is_described_by_the_name_of_the_signal(
        self, by: signal.Signals, memory: SimpleNamespace
    ) -> None:
        memory.available = 1  # says nothing about these
        assert describe_exit("Worker", 13, -by) == f"Worker (pid 13) was killed by {by.name}"

    def test_an_end_by_sigkill_with_memory_to_spare_is_not_put_down_to_the_kernel(
        self, memory: SimpleNamespace
    ) -> None:
        memory.available = 90
        assert describe_exit("EngineCore", 12, -9) == "EngineCore (pid 12) was killed by SIGKILL"

    def test_an_end_by_sigkill_with_memory_short_may_have_been_the_kernel(self, memory: SimpleNamespace) -> None:
        memory.available = 9
        sentence = describe_exit("EngineCore", 12, -9)
        assert sentence.startswith("EngineCore (pid 12) was killed by SIGKILL")
        assert "memory" in sentence

    def test_an_end_by_a_signal_without_a_name_is_described_by_its_number(self) -> None:
        assert describe_exit("EngineCore", 12, -40) == "EngineCore (pid 12) was killed by signal 40"
