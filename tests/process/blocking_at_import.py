"""A module whose import, in a process that has the variable ``GATE``, waits until it is let go on."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

VARIABLE = "XINF_VLLM_TEST_GATE"


class Gate:
    """The test's side."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._timeout = timeout
        self._path = directory / "gate"
        os.mkfifo(self._path)
        os.mkfifo(f"{self._path}.reached")
        # Open for both, so that no open() waits and no end is ever missing.
        self._gate = os.open(self._path, os.O_RDWR)
        self._reached = os.open(f"{self._path}.reached", os.O_RDWR)

    @property
    def environment(self) -> Mapping[str, str]:
        return {VARIABLE: str(self._path)}

    def wait_until_reached(self) -> None:
        assert select.select([self._reached], [], [], self._timeout)[0], "the import did not begin"
        os.read(self._reached, 1)

    def open(self) -> None:
        os.write(self._gate, b"1")

    def close(self) -> None:
        os.close(self._gate)
        os.close(self._reached)


def tell_size(end: Connection, payload: bytes) -> None:
    end.send(len(payload))


def wait_at(path: str) -> None:
    with open(f"{path}.reached", "wb", buffering=0) as reached, open(path, "rb", buffering=0) as gate:
        reached.write(b"1")
        gate.read(1)


if path := os.environ.get(VARIABLE):
    wait_at(path)
