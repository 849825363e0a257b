"""The errors this package raises.

They cross process borders inside xoscar, which rebuilds the class without arguments: so each takes exactly one string
or none, holds nothing else, and its module imports nothing beyond the standard library.
"""

from __future__ import annotations


class BackendError(RuntimeError):
    """Something of the vLLM backend failed; the message says what, why and what to do."""


class ControlError(BackendError):
    """A pause, resume, sleep or wake-up could not be carried out; the message says what is so now."""


class RequestError(BackendError):
    """A request failed, and it was not the request's fault.

    Clients read the text of this class and of those below it: it says what happened and whether to send the request
    again, and never holds text cut from logs, which may hold paths and credentials. The cause goes to the log.
    """


class EngineStartError(BackendError):
    """The vLLM engine could not be started."""


class EngineStartTimeoutError(EngineStartError):
    """The vLLM engine was not ready by its deadline."""


class UnsupportedVersionError(BackendError):
    """The vLLM that was found is missing or outside the tested range."""


class EngineStoppedError(RequestError):
    """The model was stopped while it was loading or while the request ran."""


class EngineDiedError(RequestError):
    """The vLLM engine died while it served."""


class EngineRestartingError(RequestError):
    """The request waited too long for an engine that is being restarted; it may be sent again."""


class CannotResumeError(RequestError):
    """The engine died after the request had begun, and it is of a kind that cannot go on."""


class RequestQuarantinedError(RequestError):
    """The engine died repeatedly while it worked on this request."""


class EngineStaleError(RequestError):
    """The engine was restarted and has not got back the weights that it was given after its launch."""


class EnginePausedError(RequestError):
    """The model is paused or asleep, and the request was not to wait, or waited for too long."""


class RequestFailedError(RequestError):
    """vLLM failed on this request, and would again; the engine lives."""


class BadRequestError(ValueError):
    """A request that cannot be served as it is; only this request failed. Clients read the text."""


class RequestNotFoundError(BadRequestError):
    """The request names something that is not there."""


class UnprocessableRequestError(BadRequestError):
    """The request is well-formed, but what it holds or refers to cannot be used."""


class BadLaunchArgumentError(ValueError):
    """A launch argument that cannot work; nothing was started."""
