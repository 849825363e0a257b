"""Here neither Xinference, vLLM nor torch can be imported, whether or not they are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

import pytest

HOSTS = frozenset({"torch", "transformers", "vllm", "xinference", "xoscar"})


class _NoHosts(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in HOSTS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture(autouse=True)
def without_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an environment without them; a test that needs one puts a stub into ``sys.modules``."""
    for name in [name for name in sys.modules if name.partition(".")[0] in HOSTS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoHosts(), *sys.meta_path])
    yield
