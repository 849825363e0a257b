"""Which checkpoints count as the same, and how often their files are read for that."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xinf_vllm_backend.plugin import checkpoint
from xinf_vllm_backend.plugin.checkpoint import Checkpoint, CheckpointChangedError, Reading, checksum, files

TIMEOUT = 30.0  # seconds; only a hang reaches it
WEIGHTS = "model-00001-of-00002.safetensors"
GO_ON = threading.Event()


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that were read, in no order; what is known of them is kept in a directory of the test."""
    names: list[str] = []
    original = checkpoint._checksum

    def noted(path: Path, *args: Any) -> str:
        names.append(path.name)
        return original(path, *args)

    monkeypatch.setattr(checkpoint, "_checksum", noted)
    monkeypatch.setattr(checkpoint, "_kept", lambda directory: tmp_path / "kept" / f"{Path(directory).name}.json")
    monkeypatch.setattr(checkpoint, "UNSETTLED", -1.0)
    return names


Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a checkpoint of two files, which ends with ``end``."""

    def make(name: str = "one", end: bytes = b"1") -> str:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")
        (directory / "tokenizer.json").write_text(name)
        (directory / "model.safetensors.index.json").write_text("{}")
        (directory / WEIGHTS).write_bytes(b"header" + bytes(9 << 20) + end)
        (directory / "model-00002-of-00002.safetensors").write_bytes(b"header")
        return str(directory)

    return make


def loaded(directory: str) -> Checkpoint:
    return Reading(directory).result(TIMEOUT)


def is_there(known: Checkpoint) -> bool:
    return known.is_there(threading.Event())


class TestAChecksum:
    def test_is_that_of_a_copy_and_of_no_other_values(self, make: Make) -> None:
        sums = [checksum(make(name, end), GO_ON) for name, end in (("one", b"1"), ("copy", b"1"), ("other", b"2"))]
        assert sums[0] == sums[1] != sums[2]

    def test_is_of_the_weights_and_their_configuration_alone(self, make: Make) -> None:
        before = checksum(directory := make(), GO_ON)
        Path(directory, "tokenizer.json").write_text("another")
        Path(directory, "README.md").write_text("new")
        assert checksum(directory, GO_ON) == before
        Path(directory, "config.json").write_text('{"rope": 2}')
        assert checksum(directory, GO_ON) != before

    def test_reads_each_file_once(self, make: Make, read: list[str]) -> None:
        first = checksum(directory := make(), GO_ON)
        assert sorted(read) == sorted(files(directory))
        read.clear()
        assert checksum(directory, GO_ON) == first
        assert read == []

    def test_reads_again_what_was_changed_and_no_more(self, make: Make, read: list[str]) -> None:
        before = checksum(directory := make(), GO_ON)
        read.clear()
        path = Path(directory, WEIGHTS)
        times = os.stat(path)
        path.write_bytes(b"header" + bytes(9 << 20) + b"2")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p has it
        assert checksum(directory, GO_ON) != before
        assert read == [WEIGHTS]

    def test_of_a_file_that_was_just_changed_is_not_kept(
        self, make: Make, read: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint, "UNSETTLED", 1000.0)
        directory = make()
        for _ in range(2):
            checksum(directory, GO_ON)
        assert read.count(WEIGHTS) == 2

    @pytest.mark.parametrize("kept", ["", "[]", '{"config.json": 7}', '{"config.json": [[1], 2]}'])
    def test_is_made_again_where_what_was_kept_is_damaged(
        self, make: Make, read: list[str], kept: str, tmp_path: Path
    ) -> None:
        before = checksum(directory := make(), GO_ON)
        (tmp_path / "kept" / "one.json").write_text(kept)
        read.clear()
        assert checksum(directory, GO_ON) == before
        assert sorted(read) == sorted(files(directory))

    def test_does_without_a_place_where_it_is_kept(
        self, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "kept").write_text("no directory")
        assert checksum(make(), GO_ON)
        assert "could not be kept" in caplog.text

    def test_of_a_file_that_changes_meanwhile_is_an_error(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = make()
        identity = checkpoint._identity
        monkeypatch.setattr(checkpoint, "_identity", lambda path: (*identity(path), os.urandom(4)))
        with pytest.raises(CheckpointChangedError, match=r"was changed while it was read"):
            checksum(directory, GO_ON)

    def test_that_is_not_waited_for_is_an_error(self, make: Make) -> None:
        stop = threading.Event()
        stop.set()
        with pytest.raises(InterruptedError):
            checksum(make(), stop)


class TestACheckpoint:
    def test_is_there_as_long_as_nothing_changes_and_nothing_is_read_for_that(
        self, make: Make, read: list[str]
    ) -> None:
        known = loaded(make())
        read.clear()
        assert is_there(known)
        assert read == []

    def test_is_there_where_a_copy_of_it_is(self, make: Make) -> None:
        known = loaded(directory := make())
        make()  # writes the same again
        assert files(directory) != known.files
        assert is_there(known)

    @pytest.mark.parametrize("change", ["other values", "a file more", "a file less", "no directory"])
    def test_is_not_there_where_another_is(self, make: Make, change: str) -> None:
        known = loaded(directory := make())
        path = Path(directory, WEIGHTS)
        if change == "other values":
            make(end=b"2")
        elif change == "a file more":
            path.with_name("model-00003-of-00002.safetensors").write_bytes(b"more")
        elif change == "a file less":
            path.unlink()
        else:
            Path(directory).rename(f"{directory}-moved")
        assert not is_there(known)

    def test_whose_checksum_is_not_known_is_there_only_while_nothing_changes(self, make: Make) -> None:
        known = dataclasses.replace(loaded(make()), checksum=None)
        assert is_there(known)
        make()
        assert not is_there(known)

    def test_that_changes_while_it_is_loaded_is_never_there(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        reading = Reading(directory := make())
        make(end=b"2")
        known = reading.result(TIMEOUT)
        assert known == Checkpoint(directory, {}, None)
        assert not is_there(known)
        assert "was changed while it was loaded" in caplog.text

    def test_that_is_no_directory_is_known_as_none(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING)
        known = loaded("meta/no-such-model")
        assert (known.files, known.checksum) == ({}, None)
        assert not is_there(known)

    def test_is_the_same_behind_json(self, make: Make) -> None:
        known = loaded(make())
        assert Checkpoint.parse(json.loads(json.dumps(dataclasses.asdict(known)))) == known
