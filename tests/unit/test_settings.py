"""The options: where each may come from, and what is said about one that cannot be used."""

from __future__ import annotations

import re
from typing import Any

import pytest

from xinf_vllm_backend.errors import BadLaunchArgumentError
from xinf_vllm_backend.settings import ENVIRONMENT_PREFIX, Settings, variable

NUMBERS = sorted(set(Settings.model_fields) - {"engine_start_method", "device_locks", "resume_inexact"})


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def _refused(options: dict[str, Any]) -> str:
    with pytest.raises(BadLaunchArgumentError) as caught:
        Settings.resolve(options)
    sentence: str
    (sentence,) = caught.value.args
    return sentence


class TestSources:
    def test_without_anything_given_the_defaults_hold(self) -> None:
        assert Settings.resolve({}) == Settings()

    def test_a_variable_wins_over_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XINF_VLLM_LOAD_TIMEOUT", "600")
        assert Settings.resolve({}).load_timeout == 600.0

    def test_the_launch_wins_over_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XINF_VLLM_LOAD_TIMEOUT", "600")
        settings = Settings.resolve({"load_timeout": 30})
        assert settings.load_timeout == 30.0
        assert settings.stop_timeout == Settings().stop_timeout

    def test_the_launch_wins_also_over_a_variable_that_cannot_be_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XINF_VLLM_LOAD_TIMEOUT", "soon")
        assert Settings.resolve({"load_timeout": 30}).load_timeout == 30.0

    def test_the_command_line_gives_strings(self) -> None:
        assert Settings.resolve({"load_timeout": "12.5", "cpu_kv_cache_gib": "0"}).load_timeout == 12.5

    @pytest.mark.parametrize("name", NUMBERS)
    def test_every_option_has_a_variable(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ENVIRONMENT_PREFIX + name.upper(), "3")
        assert getattr(Settings.resolve({}), name) == 3

    def test_options_whose_values_are_words_have_a_variable_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XINF_VLLM_START_METHOD", "spawn")
        monkeypatch.setenv("XINF_VLLM_DEVICE_LOCKS", "none")
        monkeypatch.setenv("XINF_VLLM_RESUME_INEXACT", "fail")
        settings = Settings.resolve({})
        assert (settings.engine_start_method, settings.device_locks, settings.resume_inexact) == (
            "spawn",
            "none",
            "fail",
        )

    def test_the_environment_is_read_when_the_launch_is_made_and_not_when_we_are_imported(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = Settings.resolve({})
        monkeypatch.setenv("XINF_VLLM_STOP_TIMEOUT", "77")
        assert before.stop_timeout != 77
        assert Settings.resolve({}).stop_timeout == 77


class TestUnusableValue:
    @pytest.mark.parametrize(
        "value", ["soon", "", None, [1], 0, -1, float("nan")], ids=["word", "empty", "none", "list", "0", "-1", "nan"]
    )
    def test_a_value_that_cannot_be_used_is_refused_in_one_sentence_that_names_it_and_its_unit(
        self, value: Any
    ) -> None:
        sentence = _refused({"load_timeout": value})
        assert sentence.startswith(f"load_timeout={value!r} cannot be used: ")
        assert "time in seconds" in sentence
        assert "\n" not in sentence
        assert sentence.endswith(".")

    @pytest.mark.parametrize("name", [*NUMBERS, "engine_start_method"])
    def test_a_value_that_cannot_be_used_is_explained_by_the_meaning_of_its_option(self, name: str) -> None:
        sentence = _refused({name: "-1"})
        assert f"{name}='-1' cannot be used" in sentence
        assert str(Settings.model_fields[name].description) in sentence

    def test_a_value_that_cannot_be_used_is_refused_also_when_it_comes_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINF_VLLM_STOP_TIMEOUT", "soon")
        assert "XINF_VLLM_STOP_TIMEOUT='soon'" in _refused({})

    def test_a_value_that_cannot_be_used_names_no_library_and_no_link(self) -> None:
        assert not re.search("pydantic|https?:|validation error", _refused({"load_timeout": "soon"}), re.IGNORECASE)

    def test_infinity_is_refused_where_a_wait_needs_an_end(self) -> None:
        assert "load_timeout=inf" in _refused({"load_timeout": float("inf")})


class TestOptions:
    def test_only_our_options_are_taken_out_of_the_launch_arguments(self) -> None:
        arguments = {"load_timeout": "600", "max_model_len": 256, "cpu_kv_cache_gib": 1}
        options = Settings.options_in(arguments)
        assert options == {"load_timeout": "600", "cpu_kv_cache_gib": 1}
        assert arguments == {"max_model_len": 256}

    def test_no_launch_argument_is_taken_where_none_is_ours(self) -> None:
        arguments = {"max_model_len": 256}
        assert Settings.options_in(arguments) == {}
        assert arguments == {"max_model_len": 256}

    def test_settings_do_not_change_after_they_were_made(self) -> None:
        settings = Settings()
        with pytest.raises(ValueError, match="frozen"):
            settings.load_timeout = 1.0  # type: ignore[misc]

    @pytest.mark.parametrize("name", NUMBERS)
    def test_every_option_says_its_unit_and_meaning(self, name: str) -> None:
        description = Settings.model_fields[name].description
        assert description is not None
        assert re.search(r"\b(seconds|in GiB|number of)\b", description)
