"""Changes to ``os.environ`` that are private to a thread: as real to it as any, and not there for the others."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from os import environ  # as libraries hold it
from typing import Any

import pytest

from xinf_vllm_backend.process import environment

TIMEOUT = 30.0  # seconds; only reached when something is broken

SET, DELETED, NEW, OTHER = (f"XINF_VLLM_TEST_{name}" for name in ("SET", "DELETED", "NEW", "OTHER"))


@pytest.fixture(autouse=True)
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What really is in the environment, before and after each test."""
    monkeypatch.setenv(SET, "real")
    monkeypatch.setenv(DELETED, "real")
    monkeypatch.delenv(NEW, raising=False)
    before = everything()
    yield before
    assert everything() == before


def everything() -> dict[str, str]:
    """All variables that are seen here, but for one that pytest itself writes."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def on_another_thread(function: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(function()), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    return answers[0]


@pytest.fixture
def changed() -> Iterator[None]:
    """One variable is set, one is changed and one is deleted, for this thread."""
    with environment.private(**{SET: "private"}):
        os.environ[NEW] = "private"
        del os.environ[DELETED]
        yield


@pytest.mark.usefixtures("changed")
class TestPrivateChange:
    def test_a_private_change_is_seen_when_a_variable_is_read(self) -> None:
        assert os.environ[SET] == os.environ[NEW] == "private"
        assert os.environ.get(SET) == os.getenv(SET) == "private"
        with pytest.raises(KeyError, match=DELETED):
            os.environ[DELETED]
        assert os.environ.get(DELETED) is os.getenv(DELETED) is None
        assert os.getenv(DELETED, "default") == "default"

    def test_a_private_change_is_seen_when_all_variables_are_read(self, real: dict[str, str]) -> None:
        expected = {**real, SET: "private", NEW: "private"}
        del expected[DELETED]
        assert everything() == expected
        everything_there = dict(os.environ)
        assert os.environ.copy() == {**os.environ} == os.environ | {} == everything_there
        assert os.environ == everything_there
        assert sorted(os.environ) == sorted(os.environ.keys()) == sorted(everything_there)
        assert sorted(os.environ.values()) == sorted(everything_there.values())
        assert len(os.environ) == len(everything_there)

    def test_a_private_change_is_seen_when_a_variable_is_looked_for(self) -> None:
        assert [name in os.environ for name in (SET, NEW, DELETED)] == [True, True, False]

    def test_a_private_change_is_seen_in_a_reference_to_the_environment(self) -> None:
        assert environ is os.environ
        assert environ[SET] == "private"

    def test_a_private_change_is_not_there_for_another_thread(self, real: dict[str, str]) -> None:
        assert on_another_thread(everything) == real
        assert on_another_thread(lambda: [os.getenv(name) for name in (SET, NEW, DELETED)]) == ["real", None, "real"]
        assert on_another_thread(lambda: len(os.environ) == len(list(os.environ)))

    def test_a_private_change_is_not_there_in_c(self) -> None:
        assert os.environb[SET.encode()] == b"real"
        script = f"import os; print(os.environ['{SET}'])"
        assert subprocess.check_output([sys.executable, "-c", script], text=True, timeout=TIMEOUT) == "real\n"

    def test_a_private_change_can_be_undone(self) -> None:
        os.environ[SET] = "real"
        os.environ[DELETED] = "real"
        del os.environ[NEW]
        assert (os.environ[SET], os.environ[DELETED], NEW in os.environ) == ("real", "real", False)

    def test_a_private_change_hides_what_another_thread_changes_and_nothing_else(self) -> None:
        def change(value: str) -> None:
            os.environ.update({SET: value, DELETED: value, OTHER: value})

        on_another_thread(lambda: change("changed"))
        assert (os.environ[SET], DELETED in os.environ, os.environ[OTHER]) == ("private", False, "changed")
        on_another_thread(lambda: change("real"))
        on_another_thread(lambda: os.environ.pop(OTHER))


class TestMappingWithPrivateChanges:
    @pytest.fixture(autouse=True)
    def private(self, real: dict[str, str]) -> Iterator[None]:
        with environment.private():
            yield

    @pytest.mark.parametrize("value", ["", "x=y", "äöü", "\\udcff"])
    def test_with_private_changes_values_come_back_as_they_were_given(self, value: str) -> None:
        os.environ[NEW] = value
        assert os.environ[NEW] == value

    def test_with_private_changes_setdefault_sets_only_what_is_missing(self) -> None:
        assert os.environ.setdefault(SET, "default") == "real"
        assert os.environ.setdefault(NEW, "default") == "default"
        del os.environ[SET]
        assert os.environ.setdefault(SET, "default") == "default"

    def test_with_private_changes_pop_takes_out(self) -> None:
        assert os.environ.pop(SET) == "real"
        assert os.environ.pop(SET, None) is None
        with pytest.raises(KeyError):
            os.environ.pop(SET)
        with pytest.raises(KeyError):
            del os.environ[SET]
        with pytest.raises(KeyError):
            del os.environ[NEW]

    def test_with_private_changes_update_sets_all(self) -> None:
        os.environ.update({SET: "updated"}, **{NEW: "updated"})
        os.environ |= {DELETED: "updated"}
        assert [os.environ[name] for name in (SET, NEW, DELETED)] == ["updated"] * 3

    def test_with_private_changes_clear_leaves_none(self) -> None:
        os.environ.clear()
        assert (dict(os.environ), len(os.environ), list(os.environ)) == ({}, 0, [])

    @pytest.mark.parametrize("bad", [1, None, b"bytes"])
    def test_with_private_changes_what_is_no_text_is_refused(self, bad: Any) -> None:
        with pytest.raises(TypeError, match="str expected, not"):
            os.environ[NEW] = bad
        with pytest.raises(TypeError, match="str expected, not"):
            os.environ[bad] = "value"
        with pytest.raises(TypeError, match="str expected, not"):
            os.environ[bad]
        assert NEW not in os.environ

    def test_inner_private_changes_are_over_before_outer_ones(self) -> None:
        os.environ[SET] = "outer"
        with environment.private(**{NEW: "inner"}):
            os.environ[SET] = "inner"
            assert (os.environ[SET], os.environ[NEW]) == ("inner", "inner")
        assert (os.environ[SET], NEW in os.environ) == ("outer", False)

    def test_outer_private_changes_are_seen_within_inner_ones(self) -> None:
        os.environ[SET] = "outer"
        del os.environ[DELETED]
        with environment.private(**{NEW: "inner"}):
            assert (os.environ[SET], DELETED in os.environ, os.environ[NEW]) == ("outer", False, "inner")


class TestAfterPrivateChanges:
    def test_after_private_changes_nothing_has_changed(self, real: dict[str, str]) -> None:
        with environment.private(**{SET: "private"}):
            os.environ[NEW] = "private"
            del os.environ[DELETED]
        assert everything() == real

    def test_after_private_changes_nothing_has_changed_when_it_failed(self, real: dict[str, str]) -> None:
        with pytest.raises(ZeroDivisionError), environment.private(**{SET: "private"}):
            os.environ.clear()
            raise ZeroDivisionError
        assert everything() == real

    def test_after_private_changes_further_ones_are_public(self) -> None:
        with environment.private():
            pass
        os.environ[NEW] = "real"
        assert on_another_thread(lambda: os.environb[NEW.encode()]) == b"real"
        del os.environ[NEW]
        assert on_another_thread(lambda: os.getenv(NEW)) is None


class TestManyThreads:
    def test_each_of_many_threads_sees_its_own_private_changes(self, real: dict[str, str]) -> None:
        count = 8
        all_are_here = threading.Barrier(count, timeout=TIMEOUT)
        seen: dict[int, tuple[str, int, list[str]]] = {}

        def configure(number: int) -> None:
            all_are_here.wait()  # they also are the first ones at once
            with environment.private(**{SET: str(number)}):
                os.environ[f"{NEW}_{number}"] = "private"
                all_are_here.wait()
                news = [name for name in os.environ if name.startswith(NEW)]
                seen[number] = os.environ[SET], len(everything()), news
                all_are_here.wait()

        threads = [threading.Thread(target=configure, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        assert seen == {number: (str(number), len(real) + 1, [f"{NEW}_{number}"]) for number in range(count)}


class TestPublicChange:
    def test_a_public_change_is_there_for_all_and_then_undone(self, real: dict[str, str]) -> None:
        with environment.public(**{SET: "public", NEW: "public"}):
            for name in (SET, NEW):
                assert os.environb[name.encode()] == b"public"
                assert on_another_thread(functools.partial(os.environ.get, name)) == "public"
        assert everything() == real

    def test_a_public_change_is_over_also_when_it_failed(self, real: dict[str, str]) -> None:
        with pytest.raises(ZeroDivisionError), environment.public(**{SET: "public", NEW: "public"}):
            raise ZeroDivisionError
        assert everything() == real


def test_outside_of_private_changes_the_environment_is_python_s_own() -> None:
    plain = type(os.environ)
    with environment.private(), environment.private():
        assert type(os.environ) is not plain
    assert type(os.environ) is plain, "libraries read variables for each token"
