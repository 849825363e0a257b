"""The errors this package raises.

They cross process borders inside xoscar, which rebuilds the class without arguments: so each takes exactly one string
or none, holds nothing else, and its module imports nothing beyond the standard library.
"""

from __future__ import annotations


class BackendError(RuntimeError):
    """Something of the vLLM backend failed; the message says what, why and what to do."""


class EngineStartError(BackendError):
    """The vLLM engine could not be started."""


class EngineStartTimeoutError(EngineStartError):
    """The vLLM engine was not ready by its deadline."""


class EngineStoppedError(BackendError):
    """The model was stopped while the request ran."""


class EngineDiedError(BackendError):
    """The vLLM engine died while it served."""


class EngineRestartingError(BackendError):
    """The request waited too long for an engine that is being restarted; it may be sent again."""


class CannotResumeError(BackendError):
    """The request had begun when its engine died, and is of a kind that cannot go on."""


class RequestQuarantinedError(BackendError):
    """The engine died again and again while it worked on this request."""


class EngineStaleError(BackendError):
    """The engine was restarted and has not got back the weights that it was given after its launch."""


class BadRequestError(ValueError):
    """A request that cannot be served as it is; only this request failed."""


class BadLaunchArgumentError(ValueError):
    """A launch argument that cannot work; nothing was started."""


class UnsupportedVersionError(BackendError):
    """The vLLM that was found is missing or outside the tested range."""
