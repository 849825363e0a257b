"""What the variables of OpenMP say about threads and CPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from xinf_vllm_backend.process import threads

VARIABLE = "XINF_VLLM_TEST_THREADS"


class TestNumberOfThreads:
    @pytest.mark.parametrize(
        ("value", "count"),
        [
            ("4", 4),
            (" 4 ", 4),
            ("4,2", 4),
            ("4 , 2", 4),
            ("0", 0),
            ("", 0),
            (",2", 0),
            ("-1", 0),
            ("four", 0),
            ("²", 0),
        ],
    )
    def test_a_number_of_threads_is_the_first_one_or_none(
        self, monkeypatch: pytest.MonkeyPatch, value: str, count: int
    ) -> None:
        monkeypatch.setenv(VARIABLE, value)
        assert threads._count(VARIABLE) == count

    def test_a_number_of_threads_is_none_where_nothing_is_said(self) -> None:
        assert threads._count(VARIABLE) == 0


class TestListOfCpus:
    @pytest.mark.parametrize(
        ("text", "cpus"),
        [
            ("", []),
            ("3", [3]),
            ("0 2 1", [0, 2, 1]),
            ("0,2,1", [0, 2, 1]),
            ("0, 2", [0, 2]),
            ("0-3", [0, 1, 2, 3]),
            ("0-6:2", [0, 2, 4, 6]),
            ("0-5:2", [0, 2, 4]),
            ("0 3-5,7-11:2", [0, 3, 4, 5, 7, 9, 11]),
            ("1 1", [1, 1]),
        ],
    )
    def test_a_list_of_cpus_is_read_as_openmp_reads_it(self, text: str, cpus: list[int]) -> None:
        assert threads._cpus(text) == cpus

    @pytest.mark.parametrize("text", ["all", "-3", "0-3:0", "0-3:x", "1.5", "0 x", "0--3", "3-1"])
    def test_a_list_of_cpus_that_cannot_be_read_is_empty(self, text: str) -> None:
        assert threads._cpus(text) == []


class TestPin:
    def test_a_cpu_that_we_do_not_have_is_passed_over(self) -> None:
        before = os.sched_getaffinity(0)
        threads._pin(0, 1 << 12)
        assert os.sched_getaffinity(0) == before


class TestApply:
    def test_no_thread_limit_is_set_where_no_numeric_library_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules: dict[str, Any] = {name: module for name, module in threads.sys.modules.items() if name != "numpy"}
        monkeypatch.setattr(threads.sys, "modules", modules)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(threads.threadpoolctl, "threadpool_limits", pytest.fail)
        before = os.sched_getaffinity(0)
        threads.apply_thread_limits()
        assert os.sched_getaffinity(0) == before
