"""When a model process has a zygote, and what is looked at before one forks; real zygotes are for tests/process."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any, ClassVar

import pytest

from xinf_vllm_backend.engine import preload
from xinf_vllm_backend.engine.seams import platform
from xinf_vllm_backend.process.zygote.client import ZygoteUnavailableError
from xinf_vllm_backend.process.zygote.preloaded import Preloaded


class Zygote:
    """A stand-in that starts nothing; ``made`` has all of them."""

    made: ClassVar[list[Zygote]] = []

    def __init__(self, *arguments: Any) -> None:
        self.calls: list[str] = []
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def client(self) -> Any:
        raise ZygoteUnavailableError("it is a stand-in")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Zygote]:
    """The zygotes of this process, which has none yet."""
    monkeypatch.setattr(Zygote, "made", [])
    monkeypatch.setattr(preload, "Zygote", Zygote)
    monkeypatch.setattr(preload, "_zygote", None)
    monkeypatch.setattr(preload, "_given_up", False)
    return Zygote.made


class TestZygoteOfAModelProcess:
    @pytest.mark.parametrize("cpu", [False, True], ids=["with GPUs", "without"])
    @pytest.mark.parametrize(("method", "count"), [("auto", 1), ("zygote", 1), ("spawn", 0)])
    def test_a_model_process_has_a_zygote_on_every_host_unless_spawn_is_asked_for(
        self, made: list[Zygote], monkeypatch: pytest.MonkeyPatch, method: str, count: int, cpu: bool
    ) -> None:
        monkeypatch.setattr(platform, "is_cpu_build", lambda: cpu)
        preload.start_zygote(method, "model")
        preload.start_zygote(method, "model")
        assert [zygote.calls for zygote in made] == [["start"]] * count

    def test_a_zygote_that_is_given_up_ends_and_no_other_is_started(
        self, made: list[Zygote], caplog: pytest.LogCaptureFixture
    ) -> None:
        preload.start_zygote("auto", "model")
        with pytest.raises(ZygoteUnavailableError):
            preload.zygote_client("auto")
        for why in ("It segfaulted", "It segfaulted again"):
            preload.give_up_zygote(why)
            preload.start_zygote("auto", "model")
        assert [zygote.calls for zygote in made] == [["start", "stop"]]
        assert preload.zygote_client("auto") is None  # and so engine processes are spawned without further ado
        assert [record.getMessage() for record in caplog.records] == [
            "The zygote is given up, and engine processes are spawned from now on: It segfaulted"
        ]


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


def test_variables_that_imports_changed_are_as_they_were_before() -> None:
    given = {"PATH": "/bin", "LIBRARIES": "/lib"}
    imported = Preloaded(given, frozenset(), {"LIBRARIES": "/cv2:/lib", "NEW": "1", "PATH": "/opt"}, {}, {})
    here = {"PATH": "/mine", "LIBRARIES": "/cv2:/lib", "NEW": "1", "OTHER": "2"}
    assert imported.undone_in(here) == {"PATH": "/mine", "LIBRARIES": "/lib", "OTHER": "2"}
