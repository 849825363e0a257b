"""What an initialised accelerator does to the zygote: no child of it runs, and each process is spawned instead.

No accelerator is needed: a library with the functions of CUDA's driver and a module with those of torch stand in.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import preloaded
import process_targets as targets
import psutil
import pytest
from process_helpers import becomes, exit_code, join, on_thread, started, told

from xinf_vllm_backend.engine.preload import hazard
from xinf_vllm_backend.process.context import EngineContext
from xinf_vllm_backend.process.zygote.manager import Zygote

DRIVER = """
static int inits;
int cuInit(unsigned int flags) { inits++; return 0; }
#ifndef OLD
int cuDeviceGetCount(int *count) { if (!inits) return 3; *count = 1; return 0; }
#endif
int calls_of_cuinit(void) { return inits; }
"""
COUNTER = "calls_of_cuinit"
SONAME = "libcuda.so.1"

MakeZygote = Callable[..., Zygote]


@pytest.fixture
def make_zygote() -> Iterator[MakeZygote]:
    """A zygote that checks as those of engines do; each is stopped when the test ends."""
    zygotes: list[Zygote] = []

    def make(preload: Callable[[], None] = targets.do_nothing, hazard: Callable[[], str | None] = hazard) -> Zygote:
        zygotes.append(targets.make_zygote(preload, hazard))
        return zygotes[-1]

    yield make
    for zygote in zygotes:
        zygote.stop()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Why processes were spawned until now."""
    caplog.set_level(logging.INFO)
    said = " is spawned, not forked from the zygote: "
    return lambda: [message.partition(said)[2] for message in caplog.messages if said in message]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the stand-in for CUDA's driver."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a stand-in for CUDA's driver")

    def compile_it(*options: str) -> Path:
        directory = tmp_path_factory.mktemp("driver")
        (directory / "driver.c").write_text(DRIVER)
        linked = ["-shared", "-fPIC", f"-Wl,-soname,{SONAME}", "-o", SONAME, "driver.c"]
        subprocess.run([compiler, *options, *linked], cwd=directory, check=True, timeout=60)
        return directory / SONAME

    return compile_it


def is_forked(zygote: Zygote) -> bool:
    """Whether a process that is started now comes from ``zygote``, and not from us."""
    _, parent = told(EngineContext({}, find_zygote=zygote.client), targets.tell_parent)
    assert parent in (zygote.pid, os.getpid())
    return bool(parent == zygote.pid)


class TestTheDriverOfCuda:
    def test_a_zygote_that_has_loaded_the_driver_alone_forks_and_does_not_initialise_it(
        self, make_zygote: MakeZygote, compiled: Callable[..., Path]
    ) -> None:
        zygote = make_zygote(functools.partial(preloaded.a_library, compiled()))
        assert is_forked(zygote)
        context = EngineContext({}, find_zygote=zygote.client)
        assert told(context, targets.tell_of_a_library, SONAME, COUNTER) == 0

    def test_a_driver_that_nobody_loaded_is_not_loaded_by_the_check(
        self, make_zygote: MakeZygote, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(compiled().parent))  # where it would be found
        zygote = make_zygote()
        assert is_forked(zygote)
        context = EngineContext({}, find_zygote=zygote.client)
        assert told(context, targets.tell_of_a_library, SONAME, COUNTER) is None

    def test_a_process_is_spawned_once_the_driver_was_initialised_in_the_zygote(
        self, make_zygote: MakeZygote, compiled: Callable[..., Path], log: Callable[[], list[str]]
    ) -> None:
        zygote = make_zygote(functools.partial(preloaded.a_library, compiled(), "cuInit"))
        assert not is_forked(zygote)
        assert log() == ["it has initialised CUDA (cuDeviceGetCount() answered 0)"]

    def test_a_process_is_spawned_where_the_driver_cannot_be_asked(
        self, make_zygote: MakeZygote, compiled: Callable[..., Path], log: Callable[[], list[str]]
    ) -> None:
        zygote = make_zygote(functools.partial(preloaded.a_library, compiled("-DOLD")))
        assert not is_forked(zygote)
        assert log() == ["libcuda.so.1 does not tell whether it was initialised"]


class TestDeviceFiles:
    def test_a_process_is_spawned_while_the_zygote_has_a_device_open(
        self, make_zygote: MakeZygote, tmp_path: Path, log: Callable[[], list[str]]
    ) -> None:
        (tmp_path / "kfd").touch()
        zygote = make_zygote(functools.partial(preloaded.an_open_device, tmp_path / "kfd"))
        assert not is_forked(zygote)
        assert log() == [f"it has {tmp_path / 'kfd'} open"]


@pytest.mark.parametrize("accelerator", ["cuda", "xpu"])
class TestSignsOfTorch:
    def test_a_zygote_with_a_torch_that_has_initialised_nothing_forks(
        self, make_zygote: MakeZygote, accelerator: str
    ) -> None:
        assert is_forked(make_zygote(functools.partial(preloaded.a_torch, accelerator)))

    def test_a_process_is_spawned_once_torch_has_initialised_an_accelerator(
        self, make_zygote: MakeZygote, accelerator: str, log: Callable[[], list[str]]
    ) -> None:
        assert not is_forked(make_zygote(functools.partial(preloaded.a_torch, accelerator, is_initialized=True)))
        assert log() == [f"it has initialised torch.{accelerator}"]

    def test_a_process_is_spawned_where_torch_cannot_tell_a_bad_fork(
        self, make_zygote: MakeZygote, accelerator: str, log: Callable[[], list[str]]
    ) -> None:
        assert not is_forked(make_zygote(functools.partial(preloaded.a_torch, accelerator, fork="unknown")))
        assert log() == [f"torch.{accelerator} does not tell whether it was initialised before a fork"]

    def test_a_process_whose_fork_is_bad_is_spawned_and_its_target_runs_once(
        self, make_zygote: MakeZygote, accelerator: str, tmp_path: Path, log: Callable[[], list[str]]
    ) -> None:
        """The zygote itself shows nothing: torch tells in the child alone."""
        zygote = make_zygote(functools.partial(preloaded.a_torch, accelerator, fork="bad"))
        context = EngineContext({}, find_zygote=zygote.client)
        process = started(context, targets.append, tmp_path / "file", "once")
        assert exit_code(process) == 0
        assert (tmp_path / "file").read_text() == "once"
        assert not process.was_forked
        assert log() == [f"torch.{accelerator} was initialised before the fork"]
        assert becomes(lambda: children(zygote) == [])


class TestATorchForCuda:
    """One whose devices were counted before the fork."""

    def test_a_zygote_on_a_host_without_the_driver_forks(self, make_zygote: MakeZygote) -> None:
        assert is_forked(make_zygote(functools.partial(preloaded.a_torch, "cuda", fork="bad", cuda="13.0")))

    def test_a_process_is_spawned_where_there_is_the_driver(
        self, make_zygote: MakeZygote, compiled: Callable[..., Path], log: Callable[[], list[str]]
    ) -> None:
        driver = str(compiled())
        preload = functools.partial(preloaded.a_torch, "cuda", fork="bad", cuda="13.0", driver=driver)
        assert not is_forked(make_zygote(preload))
        assert log() == ["torch.cuda was initialised before the fork"]


class TestTheCheckOfAChild:
    @pytest.mark.parametrize(
        ("how", "preload", "reason"),
        [
            ("raises", targets.do_nothing, "its child ended before it was checked"),
            ("is killed", targets.do_nothing, "its child ended before it was checked"),
            ("is stopped", preloaded.little_patience, "its child could not be checked within 0.2 s"),
        ],
        ids=["raises", "is killed", "is stopped"],
    )
    def test_a_process_whose_check_does_not_end_well_is_spawned_and_nothing_is_left(
        self,
        make_zygote: MakeZygote,
        how: str,
        preload: Callable[[], None],
        reason: str,
        log: Callable[[], list[str]],
    ) -> None:
        zygote = make_zygote(preload, functools.partial(preloaded.a_child_that, how))
        assert not is_forked(zygote)
        assert log() == [reason]
        assert becomes(lambda: children(zygote) == [])

    def test_a_check_that_does_not_end_holds_up_no_stop_of_the_engine(
        self, make_zygote: MakeZygote, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"
        zygote = make_zygote(hazard=functools.partial(preloaded.a_child_that, "is stopped", gate))
        context = EngineContext({}, find_zygote=zygote.client)
        starter = on_thread(lambda: is_refused(context))
        assert becomes(lambda: [child.status() for child in children(zygote)] == [psutil.STATUS_STOPPED])
        context.seal()
        join([starter])
        assert context.children == []
        gate.touch()
        for child in children(zygote):  # or the zygote would wait for it for 10 s
            child.kill()
        assert is_forked(zygote)
        assert becomes(lambda: children(zygote) == [])


def is_refused(context: EngineContext) -> None:
    with pytest.raises(RuntimeError, match="the engine is being stopped"):
        started(context, targets.do_nothing)


def children(zygote: Zygote) -> list[psutil.Process]:
    """Those that the zygote has now, also ended ones that it has not noticed yet."""
    return psutil.Process(zygote.pid).children()
