"""From what engine processes print, raise and exit with to the one sentence that a person needs.

The output is what vLLM 0.27 prints: each line of a logged message has the logger's prefix, and each line of a child
has the child's, coloured when ``VLLM_LOGGING_COLOR=1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from xinf_vllm_backend.engine import diagnosis
from xinf_vllm_backend.process.output import OutputTail

CORE, WORKER, SECOND_WORKER = "EngineCore pid=12", "Worker_TP0 pid=13", "Worker_TP1 pid=14"
BACKGROUND = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause."
)
DIRECT_CAUSE = "The above exception was the direct cause of the following exception:"
DURING = "During handling of the above exception, another exception occurred:"

Printer = Callable[..., list[str]]


def logged(source: str, *messages: str, level: str = "ERROR") -> list[str]:
    """``messages`` as vLLM's logger prints them in the child ``source``."""
    return [f"({source}) {level} 11-20 09:14:49 [core.py:1349] {line}" for line in messages]


def logged_in_colour(source: str, *messages: str, level: str = "ERROR") -> list[str]:
    head = f"\x1b[0;36m({source})\x1b[0;0m \x1b[31m{level}\x1b[0m \x1b[90m11-20 09:14:49\x1b[0m"
    return [f"{head} \x1b[90m[core.py:1349]\x1b[0m {line}" for line in messages]


def printed(source: str, *messages: str) -> list[str]:
    """``messages`` as the interpreter of the child ``source`` prints them."""
    return [f"({source}) {line}" for line in messages]


def printed_in_colour(source: str, *messages: str) -> list[str]:
    return [f"\x1b[0;36m({source})\x1b[0;0m {line}" for line in messages]


def raised(*exceptions: str, link: str = DIRECT_CAUSE) -> list[str]:
    """A traceback that ends with ``exceptions``, chained."""
    lines: list[str] = []
    for exception in exceptions:
        if lines:
            lines += ["", link, ""]
        lines += [
            "Traceback (most recent call last):",
            '  File "/site-packages/vllm/v1/engine/core.py", line 1318, in run_engine_core',
            "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)",
            "                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
            exception,
        ]
    return lines


each_style = pytest.mark.parametrize(
    "style",
    [
        pytest.param(logged, id="logged"),
        pytest.param(logged_in_colour, id="logged in colour"),
        pytest.param(printed, id="printed"),
        pytest.param(printed_in_colour, id="printed in colour"),
    ],
)


class TestRootCause:
    @each_style
    def test_the_root_cause_is_the_exception_that_a_child_printed(self, style: Printer) -> None:
        output = style(CORE, "EngineCore failed to start.", *raised("ValueError: no room for the KV cache"))
        assert diagnosis.root_cause(output) == "ValueError: no room for the KV cache"

    @each_style
    def test_the_root_cause_is_the_workers_also_when_enginecore_speaks_last(self, style: Printer) -> None:
        output = [
            *style(WORKER, "WorkerProc failed to start.", *raised("torch.AcceleratorError: no kernel image")),
            *style(CORE, "EngineCore failed to start.", *raised(BACKGROUND)),
            *printed(CORE, "Process EngineCore:", *raised(BACKGROUND)),
        ]
        assert diagnosis.root_cause(output) == "AcceleratorError: no kernel image"

    def test_the_root_cause_is_that_of_the_first_rank_where_the_other_only_lost_its_peer(self) -> None:
        output = [
            *logged(WORKER, "WorkerProc failed to start.", *raised("KeyError: 'layers.9.mlp'")),
            *logged(SECOND_WORKER, "WorkerProc failed to start.", *raised("RuntimeError: Connection closed by peer")),
            *logged(CORE, *raised(BACKGROUND)),
        ]
        assert diagnosis.root_cause(output) == "KeyError: 'layers.9.mlp'"

    def test_the_root_cause_is_not_the_lost_connection_also_when_that_is_seen_first(self) -> None:
        # gloo's words, as the rank prints them that was waiting for the other one.
        lost = "RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4242"
        output = [
            *logged(SECOND_WORKER, "WorkerProc failed to start.", *raised(lost)),
            *logged(WORKER, "WorkerProc failed to start.", *raised("KeyError: 'layers.9.mlp'")),
        ]
        assert diagnosis.root_cause(output) == "KeyError: 'layers.9.mlp'"

    def test_the_root_cause_is_the_last_of_a_chain_which_says_what_it_meant(self) -> None:
        chain = raised("FileNotFoundError: config.json", "OSError: /models/tiny is not a model directory")
        assert diagnosis.root_cause(logged(CORE, *chain)) == "OSError: /models/tiny is not a model directory"

    def test_the_root_cause_is_the_last_also_of_a_chain_by_accident(self) -> None:
        chain = raised("KeyError: 'qwen9'", "ValueError: The architecture qwen9 is not known", link=DURING)
        assert diagnosis.root_cause(printed(CORE, *chain)) == "ValueError: The architecture qwen9 is not known"

    def test_the_root_cause_is_not_replaced_by_a_chain_link_that_only_points_elsewhere(self) -> None:
        chain = raised("ValueError: no room", "RuntimeError: Engine core initialization failed. See root cause above.")
        assert diagnosis.root_cause(printed(CORE, *chain)) == "ValueError: no room"

    def test_the_root_cause_is_the_chain_of_one_process_when_two_print_at_once(self) -> None:
        mine = logged(WORKER, *raised("FileNotFoundError: a.bin", "OSError: the weights are incomplete"))
        other = logged(SECOND_WORKER, *raised("ConnectionError: rank 0 is gone", "RuntimeError: no process group"))
        interleaved = [line for pair in zip(mine, other, strict=True) for line in pair]
        assert diagnosis.root_cause(interleaved) == "OSError: the weights are incomplete"

    def test_the_root_cause_is_not_what_comes_after_the_first_failure(self) -> None:
        output = [
            *logged(CORE, *raised("ValueError: no room")),
            *printed(CORE, "Exception ignored in: <function Socket.__del__>", *raised("ZMQError: not a socket")),
        ]
        assert diagnosis.root_cause(output) == "ValueError: no room"

    def test_the_root_cause_of_the_first_of_eight_ranks_is_still_in_the_tail(self) -> None:
        # What a Worker of 0.27.1 prints that cannot read its weights, counted, and what EngineCore adds.
        frames = ["  File ...", "    ..."] * 26
        lost = raised("RuntimeError: Connection closed by peer")
        tail = OutputTail()
        for line in [
            *logged(WORKER, "WorkerProc failed to start.", *frames, *raised("KeyError: 'layers.9.mlp'")),
            *(line for rank in range(1, 8) for line in logged(f"Worker_TP{rank} pid={13 + rank}", *frames, *lost)),
            *logged(CORE, *frames[:20], *raised(BACKGROUND)),
            *printed(CORE, *frames[:26], *raised(BACKGROUND)),
        ]:
            tail.append(line)
        assert diagnosis.root_cause(tail.lines()) == "KeyError: 'layers.9.mlp'"

    def test_the_root_cause_is_found_without_any_prefix(self) -> None:
        assert diagnosis.root_cause(raised("ImportError: libcuda.so.1: cannot open")) == (
            "ImportError: libcuda.so.1: cannot open"
        )

    def test_the_root_cause_is_found_in_the_prefix_of_the_data_parallel_and_debug_modes(self) -> None:
        output = ["(EngineCore_DP1 pid=99) ERROR 11-20 09:14:49 [v1/engine/core.py:1349] ValueError: no room"]
        assert diagnosis.root_cause(output) == "ValueError: no room"

    @pytest.mark.parametrize(
        ("line", "cause"),
        [
            ("torch.AcceleratorError: CUDA error: no kernel", "AcceleratorError: CUDA error: no kernel"),
            ("huggingface_hub.errors.HFValidationError: tiny?", "HFValidationError: tiny?"),
            ("Exception: anything", "Exception: anything"),
            ("vllm.v1.core.NoRoomException: none", "NoRoomException: none"),
            ("AssertionError:  spaced \t out ", "AssertionError: spaced out"),
        ],
    )
    def test_the_root_cause_is_named_by_its_type_without_the_module(self, line: str, cause: str) -> None:
        assert diagnosis.root_cause(logged(CORE, line)) == cause

    @pytest.mark.parametrize("line", ["AssertionError", "NotImplementedError"])
    def test_the_root_cause_may_be_an_exception_without_a_text(self, line: str) -> None:
        assert diagnosis.root_cause(logged(CORE, *raised(line))) == line

    @pytest.mark.parametrize("level", ["WARNING", "INFO", "DEBUG"])
    def test_the_root_cause_is_not_an_exception_that_was_logged_and_lived_with(self, level: str) -> None:
        output = [
            *logged(WORKER, *raised("ImportError: no flash attention"), level=level),
            *logged(WORKER, *raised("ValueError: no room")),
        ]
        assert diagnosis.root_cause(output) == "ValueError: no room"

    @pytest.mark.parametrize(
        "output",
        [
            [],
            logged(CORE, "Initializing a V1 LLM engine (v0.27.1)", level="INFO"),
            logged(CORE, "an error: of no type", "Error while reading: x", "lowerError: x"),
            printed(WORKER, "Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 537.66it/s]"),
            logged(CORE, *raised(BACKGROUND)),
            printed(CORE, "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the cause."),
            printed(WORKER, "asyncio.exceptions.CancelledError: Cancelled by user"),
            ["(EngineCore pid=12)", "\x1b[0;36m(Worker pid=13)\x1b[0;0m", ""],
        ],
        ids=["nothing", "info", "no exception", "progress", "background", "engine dead", "cancelled", "empty lines"],
    )
    def test_there_is_no_root_cause_where_no_process_reports_a_failure_of_its_own(self, output: list[str]) -> None:
        assert diagnosis.root_cause(output) is None


class TestSilentExit:
    ENDED = "VllmWorker-0 (pid 13) was killed by SIGKILL"

    @pytest.mark.parametrize("how", ["was killed by SIGKILL", "exited with status 1"])
    def test_a_process_that_ended_without_a_word_is_the_root_cause_where_no_exception_is_known(self, how: str) -> None:
        ended = f"VllmWorker-0 (pid 13) {how}"
        output = [*printed(CORE, ended), *logged(CORE, *raised(BACKGROUND))]
        assert diagnosis.root_cause(output) == ended

    def test_a_process_that_ended_without_a_word_is_not_the_root_cause_beside_an_exception(self) -> None:
        output = [*printed(CORE, self.ENDED), *logged(CORE, *raised("ValueError: no room"))]
        assert diagnosis.root_cause(output) == "ValueError: no room"

    def test_a_process_that_ended_without_a_word_is_the_first_of_several(self) -> None:
        output = printed(CORE, self.ENDED, "VllmWorker-1 (pid 14) exited with status 1")
        assert diagnosis.root_cause(output) == self.ENDED


class TestAdvice:
    @pytest.mark.parametrize(
        ("module", "kept", "advice"),
        [
            ("safetensors._safetensors_rust", "SafetensorError: Error while deserializing header", "fetch it again"),
            ("torch", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "lower gpu_memory_utilization"),
            ("torch", "AcceleratorError: CUDA error: out of memory", "lower gpu_memory_utilization"),
        ],
    )
    def test_a_cause_that_does_not_say_what_to_do_comes_with_advice_behind_its_own_words(
        self, module: str, kept: str, advice: str
    ) -> None:
        sentence = diagnosis.root_cause(logged(WORKER, *raised(f"{module}.{kept}")))
        assert sentence is not None
        assert sentence.startswith(kept)
        assert advice in sentence

    def test_a_cause_that_says_what_to_do_comes_without_advice(self) -> None:
        assert diagnosis.describe(ValueError("no room")) == "ValueError: no room"

    def test_a_cause_that_lists_all_it_knows_is_cut_short(self) -> None:
        for sentence in (
            diagnosis.root_cause(logged(CORE, "ValueError: none of " + "Architecture, " * 500)),
            diagnosis.describe(ValueError("none of " + "Architecture, " * 500)),
        ):
            assert sentence is not None
            assert sentence.startswith("ValueError: none of Architecture")
            assert len(sentence) <= diagnosis.MAX_LENGTH


class TestLastWords:
    def test_the_last_words_are_the_last_line_that_says_something(self) -> None:
        output = [*logged(CORE, "Loading weights", level="INFO"), "(EngineCore pid=12)", "  "]
        assert diagnosis.last_words(output) == "Loading weights"

    @each_style
    def test_the_last_words_come_without_prefix_and_colours(self, style: Printer) -> None:
        assert diagnosis.last_words(style(CORE, "waiting for rank 1")) == "waiting for rank 1"

    def test_the_last_words_are_none_where_nothing_was_printed(self) -> None:
        assert diagnosis.last_words([]) is None
        assert diagnosis.last_words(["(EngineCore pid=12)"]) is None


class Parallel(BaseModel):
    tensor_parallel_size: int = 1
    inner: dict[str, int] = {}

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.tensor_parallel_size == 7:
            raise ValueError("7 does not divide the 8 attention heads")
        if self.tensor_parallel_size == 8:
            raise AssertionError("8 is too many")
        if self.tensor_parallel_size == 9:
            raise ValueError("9 is too many.\n  Take 4.")
        return self


def _invalid(**values: Any) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Parallel(**values)
    return caught.value


class TestDescribe:
    def test_an_exception_in_one_line_has_its_type_and_text(self) -> None:
        assert diagnosis.describe(ValueError("no room")) == "ValueError: no room"

    def test_an_exception_in_one_line_of_several_lines_is_joined(self) -> None:
        error = OSError("tiny is not a model.\n\n  Look at\thttps://example.org\n")
        assert diagnosis.describe(error) == "OSError: tiny is not a model. Look at https://example.org"

    def test_an_exception_in_one_line_without_text_is_its_type(self) -> None:
        assert diagnosis.describe(AssertionError()) == "AssertionError"

    def test_an_exception_in_one_line_of_pydantic_names_the_field_and_no_boilerplate(self) -> None:
        sentence = diagnosis.describe(_invalid(tensor_parallel_size="two"))
        assert sentence == (
            "tensor_parallel_size: Input should be a valid integer, unable to parse string as an integer"
        )

    def test_an_exception_in_one_line_of_pydantic_names_a_field_inside_another(self) -> None:
        sentence = diagnosis.describe(_invalid(inner={"a": [1]}))
        assert sentence == "inner.a: Input should be a valid integer"

    def test_an_exception_in_one_line_of_a_pydantic_validator_is_its_sentence(self) -> None:
        assert diagnosis.describe(_invalid(tensor_parallel_size=7)) == "7 does not divide the 8 attention heads"

    def test_an_exception_in_one_line_of_a_pydantic_assertion_is_its_sentence(self) -> None:
        assert diagnosis.describe(_invalid(tensor_parallel_size=8)) == "8 is too many"

    def test_an_exception_in_one_line_of_pydantic_raised_with_several_lines_is_joined(self) -> None:
        assert diagnosis.describe(_invalid(tensor_parallel_size=9)) == "9 is too many. Take 4."

    def test_an_exception_in_one_line_of_pydantic_says_which_type_is_right(self) -> None:
        assert diagnosis.describe(_invalid(inner=5)) == "inner: Input should be a valid dictionary"

    def test_an_exception_in_one_line_of_pydantic_with_several_faults_names_all(self) -> None:
        sentence = diagnosis.describe(_invalid(tensor_parallel_size="two", inner=5))
        assert sentence.startswith("tensor_parallel_size: ")
        assert sentence.endswith("; inner: Input should be a valid dictionary")
        assert "\n" not in sentence

    def test_an_exception_in_one_line_is_not_taken_for_pydantics_by_its_name_alone(self) -> None:
        class ValidationError(Exception):
            pass

        assert diagnosis.describe(ValidationError("a marshmallow")) == "ValidationError: a marshmallow"


class TestWhatMayBeTheFork:
    """What a forked engine fails with, and a spawned one may not."""

    @pytest.mark.parametrize(
        "cause",
        [
            "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must",
            "RuntimeError: Cannot re-initialize XPU in forked subprocess. To use XPU with multiprocessing, you must",
            "AcceleratorError: CUDA error: initialization error",
            "RuntimeError: HIP error: initialization error",
            "RuntimeError: CUDA driver initialization failed, you might not have a CUDA gpu.",
            "RuntimeError: CUDA driver error: CUDA_ERROR_NOT_INITIALIZED",
            "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment",
            "RuntimeError: level_zero backend failed with error: UR_RESULT_ERROR_UNINITIALIZED",
            "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
            "DistBackendError: NCCL error in: /pytorch/NCCLUtils.hpp:77, unhandled system error",
        ],
    )
    def test_an_accelerator_that_cannot_be_initialised_may_be_the_fork(self, cause: str) -> None:
        assert diagnosis.may_be_the_fork(cause, [])

    @pytest.mark.parametrize(
        "cause",
        [
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.",
            "RuntimeError: NCCL error: unhandled cuda error: CUDA error: out of memory",
            "RuntimeError: NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)",
            "RuntimeError: No CUDA GPUs are available",
            "AcceleratorError: CUDA error: invalid device ordinal",
            "ValueError: max_model_len (1000000) is greater than the derived max_model_len",
            "SafetensorError: Error while deserializing header: header too small",
            "RuntimeError: Engine process initialization timed out",
        ],
    )
    def test_memory_and_configuration_are_not_the_fork(self, cause: str) -> None:
        assert not diagnosis.may_be_the_fork(cause, [])

    @pytest.mark.parametrize(
        ("how", "may_be"),
        [
            ("was killed by SIGSEGV", True),
            ("was killed by SIGABRT", True),
            ("was killed by signal 63", True),
            ("was killed by SIGKILL", False),
            ("was killed by SIGKILL, as the kernel does when memory runs out", False),
            ("was killed by SIGTERM", False),
            ("exited with status 1", False),
        ],
    )
    def test_a_process_that_a_crash_ended_may_be_the_fork(self, how: str, may_be: bool) -> None:
        ended = ["EngineCore (pid 12) exited with status 1", f"VllmWorker-0 (pid 13) {how}"]
        assert diagnosis.may_be_the_fork("RuntimeError: Engine core failed", ended) is may_be
