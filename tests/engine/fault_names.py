"""What requests with faults are marked by; apart from the faults themselves, which import vLLM and torch."""

from __future__ import annotations

FAULT = "fault"  # in extra_args of a request
FAULTS = "engine_faults:Faults"
