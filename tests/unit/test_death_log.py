"""The record of deaths on disk: written by a process that ends, read by the one that came after it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from xinf_vllm_backend.plugin import death_log


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Xinference's home directory, which does not exist yet."""
    constants = ModuleType("xinference.constants")
    constants.XINFERENCE_HOME = str(tmp_path / "home")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xinference", ModuleType("xinference"))
    monkeypatch.setitem(sys.modules, "xinference.constants", constants)
    return tmp_path / "home"


def _reasons(replica_uid: str) -> list[str]:
    return [death["reason"] for death in death_log.read(replica_uid)]


class TestRecord:
    def test_a_replica_that_never_died_has_no_deaths(self, home: Path) -> None:
        assert death_log.read("tiny-0") == []
        assert not home.exists()

    def test_deaths_are_read_oldest_first_with_their_time(self) -> None:
        before = time.time()
        death_log.record("tiny-0", "killed by SIGKILL")
        death_log.record("tiny-0", "out of memory")
        first, second = death_log.read("tiny-0")
        assert (first["reason"], second["reason"]) == ("killed by SIGKILL", "out of memory")
        assert before <= first["time"] <= second["time"] <= time.time()

    def test_a_reason_of_several_lines_and_scripts_stays_one_death(self) -> None:
        reason = 'ValueError: "模型"\nand more\u2028and more'
        death_log.record("tiny-0", reason)
        death_log.record("tiny-0", "again")
        assert _reasons("tiny-0") == [reason, "again"]

    def test_what_a_death_leaves_behind_is_below_xinferences_home(self, home: Path) -> None:
        death_log.record("tiny-0", "killed")
        assert [path.relative_to(home).parts[0] for path in home.rglob("*.jsonl")] == ["vllm_backend"]


class TestReplicas:
    def test_each_replica_has_its_own_deaths(self) -> None:
        death_log.record("tiny-0", "killed")
        assert death_log.read("tiny-1") == []

    @pytest.mark.parametrize("uid", ["a/b", "../../escape", "..", "/etc/passwd", "空 格%2F", "a.b-0"])
    def test_the_deaths_of_a_name_that_is_no_file_name_stay_inside_the_directory(self, uid: str, home: Path) -> None:
        death_log.record(uid, "killed")
        assert _reasons(uid) == ["killed"]
        (file,) = home.parent.rglob("*.jsonl")
        assert file.parent == home / "vllm_backend" / "deaths"

    def test_names_that_look_alike_when_escaped_have_their_own_deaths(self) -> None:
        death_log.record("a/b", "the first")
        death_log.record("a%2Fb", "the second")
        assert (_reasons("a/b"), _reasons("a%2Fb")) == (["the first"], ["the second"])


class TestForget:
    def test_deaths_are_forgotten_when_the_replica_is_stopped_on_purpose(self) -> None:
        death_log.record("tiny-0", "killed")
        death_log.record("tiny-1", "killed")
        death_log.forget("tiny-0")
        assert death_log.read("tiny-0") == []
        assert _reasons("tiny-1") == ["killed"]

    def test_deaths_are_forgotten_also_when_there_is_nothing_to_forget(self) -> None:
        death_log.forget("tiny-0")
        death_log.forget("tiny-0")
