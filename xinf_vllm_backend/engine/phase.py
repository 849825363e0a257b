"""The phases of an engine's start."""

from __future__ import annotations

from enum import Enum


class Phase(str, Enum):
    """What a launch is doing, in the order it does it."""

    ENVIRONMENT = "environment"
    CONFIGURATION = "engine configuration"
    PROCESSES = "processes"
    WEIGHTS = "weights"
    PROFILING = "memory profiling"
    WARM_UP = "warm-up"
    READY = "ready"
