"""Threads of numeric libraries in a forked process, which has loaded them with another environment.

Covers OpenBLAS and torch's own use of OpenMP.
"""

from __future__ import annotations

import contextlib
import os
import sys

import threadpoolctl


def apply_thread_limits() -> None:
    """Apply the numbers of threads and the CPUs that the environment sets; a spawned process does so by itself."""
    openmp = _count("OMP_NUM_THREADS")
    if "numpy" in sys.modules:
        threadpoolctl.threadpool_limits(
            _count("OPENBLAS_NUM_THREADS") or openmp or len(os.sched_getaffinity(0)), user_api="blas"
        )
    cpus = _cpus(os.environ.get("GOMP_CPU_AFFINITY", ""))
    if cpus:
        _pin(0, cpus[0])
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if openmp:
        torch.set_num_threads(openmp)
    if len(cpus) > 1 and torch.get_num_threads() > 1:
        before = _threads()
        torch.ones(1 << 20).add_(1)  # enough work for all threads; they are made in order, and kept
        for number, thread in enumerate(sorted(_threads() - before), 1):
            _pin(thread, cpus[number % len(cpus)])


def _count(variable: str) -> int:
    first = os.environ.get(variable, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _cpus(affinity: str) -> list[int]:
    """The CPUs of a list such as ``"0 3-5,7-11:2"``; none where it cannot be read."""
    cpus: list[int] = []
    for part in affinity.replace(",", " ").split():
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        try:
            cpus += range(int(first), int(last or first) + 1, int(step or 1))
        except ValueError:
            return []
    return cpus


def _pin(thread: int, cpu: int) -> None:
    with contextlib.suppress(OSError):  # not one of our CPUs: OpenMP also goes on
        os.sched_setaffinity(thread, {cpu})


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))
