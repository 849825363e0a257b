"""A logits processor of vLLM that makes the steps of an engine slow while a file is there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from weight_stand_in import SLOW

STEP = 0.05  # seconds


class SlowSteps(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._file = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]) / SLOW

    def is_argmax_invariant(self) -> bool:
        return False  # else it is not asked for greedy requests

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        if self._file.exists():
            time.sleep(STEP)
        return logits
