"""The second of two launches finds the link to the model's files that the first has made since it looked."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from xinf_vllm_backend.plugin import model_cache

BOUND = 10.0  # seconds


class Manager:
    """As Xinference's: looks for the link, and makes it. Both threads have looked before one makes it."""

    def __init__(self, directory: Path) -> None:
        self._model = directory / "model"
        self._link = directory / "link"
        self._looked = threading.Barrier(2, timeout=BOUND)

    def cache_uri(self) -> str:
        if not self._link.exists():
            self._looked.wait()
            os.symlink(self._model, self._link)
        return str(self._link)


def test_two_launches_at_once_have_the_same_link(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    manager, found = Manager(tmp_path), []
    cache_uri = model_cache._looking_again(Manager.cache_uri)
    threads = [threading.Thread(target=lambda: found.append(cache_uri(manager))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND)
    assert found == [str(tmp_path / "link")] * 2


def test_what_else_is_in_the_way_is_said() -> None:
    def cache_uri(manager: object) -> str:
        raise FileExistsError("a file")

    with pytest.raises(FileExistsError, match="a file"):
        model_cache._looking_again(cache_uri)(object())
