"""What one request made vLLM raise, as the error that its client reads."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import pytest

from xinf_vllm_backend import errors
from xinf_vllm_backend.engine.seams.exceptions import cause_of, explain_request_error
from xinf_vllm_backend.plugin.rest_errors import answer_to


def vllms(name: str, base: type[Exception] = Exception, module: str = "vllm.exceptions", **attributes: Any) -> Any:
    return type(name, (base,), {"__module__": module, **attributes})


VLLMError = vllms("VLLMError")
ClientError = vllms("VLLMClientError", VLLMError)
ServerError = vllms("VLLMServerError", VLLMError)
NotFound = vllms("VLLMNotFoundError", ClientError)
Unprocessable = vllms("VLLMUnprocessableEntityError", ClientError)
Busy = vllms("QueueOverflowError", VLLMError, http_status=HTTPStatus.SERVICE_UNAVAILABLE)


def raised_in(module: str, error: Exception) -> Exception:
    """``error``, with the traceback of having been raised in ``module``."""
    scope = {"__name__": module, "error": error}
    exec("def process():\n    raise error", scope)
    with pytest.raises(type(error)):
        scope["process"]()  # type: ignore[operator]
    return error


CAUSES: dict[str, tuple[Exception, int]] = {
    "not found": (NotFound("nothing at /secret"), 404),
    "LoRA not found": (vllms("LoRAAdapterNotFoundError", NotFound)("nothing at /secret"), 404),
    "unprocessable": (Unprocessable("the image cannot be fetched"), 422),
    "validation": (vllms("VLLMValidationError", ClientError)("top_p must be in (0, 1]"), 400),
    "validation, of a vLLM without VLLMClientError": (vllms("VLLMValidationError", ValueError)("top_p"), 400),
    "another client error": (vllms("VLLMNewError", ClientError)("no"), 400),
    "a status of 422": (vllms("NewError", VLLMError, http_status=HTTPStatus.UNPROCESSABLE_ENTITY)("no"), 422),
    "a status of 409": (vllms("NewError", VLLMError, http_status=409)("no"), 400),
    "a status of 503": (Busy("busy at /secret"), 503),
    "a status of 500": (vllms("GenerationError", ServerError, status_code=500)("/secret"), 500),
    "a status that is none": (vllms("NewError", VLLMError, http_status=None)("/secret"), 500),
    "a server error": (ServerError("/secret"), 500),
    "ValueError of the input": (raised_in("vllm.v1.engine.input_processor", ValueError("no such grammar")), 400),
    "ValueError of the renderer": (raised_in("vllm.renderers.hf", ValueError("no such role")), 400),
    "ValueError of the engine": (raised_in("vllm.v1.engine.output_processor", ValueError("/secret")), 500),
    "AssertionError": (raised_in("vllm.v1.engine.input_processor", AssertionError("/secret")), 500),
    "KeyError": (KeyError("/secret"), 500),
}


@pytest.mark.parametrize(("cause", "status"), CAUSES.values(), ids=CAUSES)
def test_the_status_tells_whose_fault_it_is_and_whether_to_send_it_again(cause: Exception, status: int) -> None:
    answer = answer_to(explain_request_error(cause, "r-7"))
    assert answer is not None
    assert answer[0] == status
    assert "/secret" not in answer[1]
    assert ("again later" in answer[1]) == (status == 503)


@pytest.mark.parametrize("status", [400, 422])
def test_the_text_of_a_clients_error_is_vllms_own(status: int) -> None:
    for cause, expected in CAUSES.values():
        if expected == status:
            assert str(explain_request_error(cause, "r-7")) == str(cause)


def test_an_error_of_ours_stays_what_it_is() -> None:
    ours = explain_request_error(errors.RequestQuarantinedError("it died twice"), "r-7")
    assert type(ours) is errors.RequestQuarantinedError and ours.args == ("it died twice",)


def test_only_vllms_exceptions_are_explained() -> None:
    assert cause_of(ValueError("of Xinference")) is None
    wrapper: BaseException = vllms("EngineGenerateError", ServerError)()
    inner = KeyError("slot")
    assert cause_of(wrapper) is wrapper
    wrapper.__cause__ = inner
    assert cause_of(wrapper) is inner
