"""Every option of the backend: name, default, unit, meaning.

Each is given per launch (``xinference launch ... --load_timeout 600``) or for all launches as an environment
variable (``XINF_VLLM_LOAD_TIMEOUT=600``); the launch wins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BadLaunchArgumentError

ENVIRONMENT_PREFIX = "XINF_VLLM_"

S = TypeVar("S", bound=BaseModel)


class Settings(BaseModel):
    """The options of one model, checked."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    load_timeout: float = Field(
        1800.0, gt=0, description="time in seconds from the start of load() until the engine must be ready"
    )
    stop_timeout: float = Field(
        10.0, gt=0, description="time in seconds an engine has to shut down before its processes are killed"
    )
    health_interval: float = Field(0.5, gt=0, description="time in seconds between two checks of the engine")
    hang_timeout: float = Field(
        30.0, gt=0, description="time in seconds without a sign of life or work after which an engine is killed"
    )
    busy_factor: float = Field(
        0.0,
        ge=0,
        description="number of hang_timeouts after which an engine that computes but answers nothing is killed; "
        "0: 10 on a CPU host, 3 on GPUs, where processes that wait look busy too",
    )
    call_timeout: float = Field(
        600.0,
        gt=0,
        description="time in seconds, if more than hang_timeout, that an engine may be silent while it carries out a "
        "call such as loading a LoRA or weights",
    )
    recovery_timeout: float = Field(
        120.0, gt=0, description="time in seconds a request waits for an engine that is being restarted, or is paused"
    )
    max_restarts: int = Field(
        5, ge=0, description="maximum number of in-place restarts in a burst; 0: an engine death ends the model process"
    )
    restart_refill: float = Field(60.0, gt=0, description="healthy seconds that earn back one restart")
    max_deaths_per_request: int = Field(
        2, ge=1, description="number of engine deaths in a row at which a request is suspected of causing them"
    )
    resume_inexact: Literal["continue", "fail"] = Field(
        "continue", description="what happens to a request that cannot continue exactly"
    )
    idle_sleep_after: float = Field(
        0.0, ge=0, description="time in seconds without a request after which an engine sleeps; 0: never"
    )
    engine_start_method: Literal["auto", "spawn", "zygote"] = Field(
        "auto", description="how engine processes are started; auto: zygote"
    )
    device_locks: str = Field(
        "auto",
        description="devices on which no other engine may start at the same time: names separated by commas; "
        "auto: those it uses, none on a CPU host; none: no locks",
    )
    cpu_kv_cache_gib: float = Field(
        0.0, ge=0, description="KV cache in GiB of each rank on a CPU host; 0: by the free memory"
    )

    @classmethod
    def options_in(cls, launch_arguments: MutableMapping[str, Any]) -> dict[str, Any]:
        """Take our options out of ``launch_arguments``; what is left there is the engine's."""
        return {name: launch_arguments.pop(name) for name in cls.model_fields if name in launch_arguments}

    @classmethod
    def resolve(cls, options: Mapping[str, Any]) -> Settings:
        """The settings for a launch with ``options``, in the environment of this process.

        Raises:
            BadLaunchArgumentError: a value is of the wrong type or out of range.
        """
        return _checked(cls, options)


class HostSettings(BaseModel):
    """The options of one worker or API process, checked; environment variables alone give them."""

    model_config = ConfigDict(frozen=True)

    host_zygote: Literal["on", "off"] = Field(
        "on", description="whether model processes are forked from a host zygote of the worker"
    )
    host_zygotes: int = Field(
        2, ge=0, description="maximum number of further host zygotes, one for each Python of a virtual environment"
    )
    push: Literal["on", "off"] = Field(
        "on", description="whether streams are pushed to the API by a link, and not pulled item by item"
    )
    failover: Literal["on", "off"] = Field(
        "on",
        description="whether requests whose model process dies go on with another replica, or with the next process",
    )

    @classmethod
    def resolve(cls) -> HostSettings:
        """The settings in the environment of this process.

        Raises:
            BadLaunchArgumentError: a value is of the wrong type or out of range.
        """
        return _checked(cls, {})


def _checked(settings: type[S], options: Mapping[str, Any]) -> S:
    variables = {name: os.environ.get(variable(name)) for name in settings.model_fields}
    given = {name: value for name, value in variables.items() if value is not None} | dict(options)
    try:
        return settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = name if name in options else variable(name)
        raise BadLaunchArgumentError(
            f"{source}={first['input']!r} cannot be used: {first['msg'].lower()} "
            f"({name}: {settings.model_fields[name].description})."
        ) from None


def variable(option: str) -> str:
    """The environment variable that gives ``option`` for all launches."""
    return ENVIRONMENT_PREFIX + option.removeprefix("engine_").upper()
