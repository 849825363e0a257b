"""Numeric libraries that the zygote has loaded use the threads and CPUs that a child's own environment asks for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import preloaded
import process_targets as targets
import pytest
from process_helpers import told

from xinf_vllm_backend.process.context import EngineContext
from xinf_vllm_backend.process.zygote.manager import Zygote

CPUS = sorted(os.sched_getaffinity(0))
ALL = set(CPUS)


@pytest.fixture
def zygote_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Zygote]]:
    """A zygote that has loaded a library where nothing was said of threads."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY"):
        monkeypatch.delenv(variable, raising=False)
    zygotes: list[Zygote] = []

    def make(library: str) -> Zygote:
        zygotes.append(targets.make_zygote(functools.partial(preloaded.modules, library)))
        return zygotes[-1]

    yield make
    for zygote in zygotes:
        zygote.stop()


def test_numpy_of_a_forked_child_has_the_threads_of_its_environment(zygote_with: Callable[[str], Zygote]) -> None:
    zygote = zygote_with("numpy")
    for environment, count in (
        ({}, min(len(CPUS), 64)),  # OpenBLAS of NumPy's wheels has no more
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "2"}, 2),
    ):
        context = EngineContext(environment, find_zygote=zygote.client)
        assert told(context, targets.tell_blas_threads) == {count}, environment


@pytest.mark.skipif(len(CPUS) < 2, reason="all threads are on the one CPU")
def test_torch_of_a_forked_child_has_the_threads_of_its_environment(zygote_with: Callable[[str], Zygote]) -> None:
    # In one test, as the zygote takes a second to import it.
    zygote = zygote_with("torch")
    first, second = CPUS[:2]
    for environment, expected in (
        ({"OMP_NUM_THREADS": "1"}, (1, [ALL])),
        ({"OMP_NUM_THREADS": "2"}, (2, [ALL, ALL])),
        ({"OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": f"{second}"}, (1, [{second}])),
        ({"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": f"{first} {second}"}, (2, [{first}, {second}])),
        ({"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": f"{second} {first}"}, (2, [{second}, {first}])),
        ({"OMP_NUM_THREADS": "3", "GOMP_CPU_AFFINITY": f"{first},{second}"}, (3, [{first}, {second}, {first}])),
    ):
        context = EngineContext(environment, find_zygote=zygote.client)
        assert told(context, targets.tell_torch_threads) == expected, environment
