"""What requests with faults are marked by; apart from the faults themselves, which import vLLM and torch."""

from __future__ import annotations

FAULT = "fault"  # in extra_args of a request
FAULTS = "engine_faults:Faults"
FAILS_WHEN_FORKED = "engine_faults:FailsWhenForked"
FAILURE = "XINF_VLLM_TEST_FAILURE"  # variable that says how a forked engine fails
