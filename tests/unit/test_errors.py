"""Our errors are shown to the user by another process than the one that raised them."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

from xinf_vllm_backend import errors

ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, Exception)]
SENTENCE = "The vLLM engine of tiny failed to start: ValueError: no such model"

each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


def _as_rebuilt_by_xoscar(error: Exception) -> Exception:
    """What xoscar's ``ErrorMessage.as_instanceof_cause`` makes of ``error``, reduced to what it asks of its class."""

    class AsCauseBase:
        def __str__(self) -> str:
            return f"[address=127.0.0.1:1, pid=1] {error}"

    attributes = {
        "__init__": lambda self, *args, **kwargs: None,
        "__getattr__": lambda self, name: getattr(error, name),
        "__wrapped__": error,
        "__module__": type(error).__module__,
        "args": error.args,
    }
    rebuilt: Exception = type(type(error).__name__, (AsCauseBase, type(error)), attributes)()
    return rebuilt


class TestPickling:
    def test_there_are_errors_to_look_at(self) -> None:
        assert errors.EngineDiedError in ERRORS
        assert len(ERRORS) >= 7

    @each_error
    def test_every_error_survives_pickling_with_its_one_string(self, error: type[Exception]) -> None:
        copy = pickle.loads(pickle.dumps(error(SENTENCE)))
        assert type(copy) is error
        assert copy.args == (SENTENCE,)
        assert str(copy) == SENTENCE

    @each_error
    def test_every_error_can_be_made_without_arguments(self, error: type[Exception]) -> None:
        assert error().args == ()

    @each_error
    def test_every_error_survives_what_xoscar_does_to_it(self, error: type[Exception]) -> None:
        rebuilt = _as_rebuilt_by_xoscar(pickle.loads(pickle.dumps(error(SENTENCE))))
        assert isinstance(rebuilt, error)
        assert str(rebuilt) == f"[address=127.0.0.1:1, pid=1] {SENTENCE}"
        assert rebuilt.args == (SENTENCE,)

    @each_error
    def test_every_error_holds_nothing_but_its_string(self, error: type[Exception]) -> None:
        assert vars(error(SENTENCE)) == {}

    def test_errors_are_unpickled_with_nothing_but_the_standard_library(self) -> None:
        # Xinference's supervisor may lack vLLM; an error that cannot be unpickled there hides what went wrong.
        script = (
            "import pickle, sys; error = pickle.loads(sys.stdin.buffer.read());"
            "foreign = {'psutil', 'pydantic', 'torch', 'vllm', 'xinference', 'xoscar'} & set(sys.modules);"
            "print(type(error).__name__, error, *foreign)"
        )
        pickled = pickle.dumps(errors.EngineDiedError(SENTENCE))
        command = [sys.executable, "-c", script]
        child = subprocess.run(command, input=pickled, capture_output=True, timeout=60, check=True)
        assert child.stdout.decode().strip() == f"EngineDiedError {SENTENCE}"


class TestTheKindSaysWhatToDo:
    def test_what_the_user_can_mend_is_a_value_error_and_everything_else_is_the_backends(self) -> None:
        requests = {errors.BadRequestError, errors.RequestNotFoundError, errors.UnprocessableRequestError}
        users = {errors.BadLaunchArgumentError, *requests}
        assert {error for error in ERRORS if issubclass(error, ValueError)} == users
        assert {error for error in ERRORS if not issubclass(error, errors.BackendError)} == users

    def test_a_start_that_took_too_long_is_a_failed_start(self) -> None:
        assert issubclass(errors.EngineStartTimeoutError, errors.EngineStartError)
