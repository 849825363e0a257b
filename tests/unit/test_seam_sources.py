"""The sources of a vLLM are read for what this package uses of it: a version that cannot be installed, such as one
without a CPU build, is checked all the same."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import Seam, core_client

MODULES = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
class Base:
    kind: str = "one"

    def __init__(self):
        self.states = {}
""",
    "vllm/engine/__init__.py": "from ..base import Base as Renamed\nfrom .core import Engine, run\n",
    "vllm/engine/core.py": """
import os

from vllm.base import Base

class Engine(Base):
    def put(self, error, *, at_once=False): ...

    @staticmethod
    def made(args): ...

class Output:
    tokens: list
    finish: str = ""

if os.name == "posix":
    def run(fn): ...

ENGINES = Engine()
Alias = Engine
""",
}


@pytest.fixture
def seam_sources(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("tests.seam_sources")


@pytest.fixture
def sources(seam_sources: Any, tmp_path: Path) -> Any:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return seam_sources.Sources(tmp_path)


def seam(attribute: str, *members: str, module: str = "vllm.engine.core", **more: Any) -> Seam:
    return Seam(module, attribute, "a test", "it fails", members, **more)


@pytest.mark.parametrize(
    "there",
    [
        seam("Engine.put"),
        seam("Engine", "put", "states", "kind"),
        seam("Engine.states"),
        seam("Alias.put"),
        seam("ENGINES.states"),
        seam("run"),
        seam("os"),
        seam("Output", "tokens", "finish"),
        seam("Engine.made", module="vllm.engine"),
        seam("Renamed.kind", module="vllm.engine"),
        seam("core", module="vllm.engine"),
        seam("gone", moved=(("vllm.engine.gone", "gone"), ("vllm.engine", "run"))),
    ],
    ids=lambda there: there.name,
)
def test_a_name_is_found_wherever_python_would_find_it(there: Seam, seam_sources: Any, sources: Any) -> None:
    assert list(seam_sources._faults_of(sources, there)) == []


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (seam("Engine.take"), "Engine.take is gone: it fails"),
        (seam("Engine", "put", "take"), "has no take: it fails"),
        (seam("Gone.put"), "Gone.put is gone"),
        (seam("put", module="vllm.gone"), "vllm.gone.put is gone"),
    ],
    ids=lambda each: each.attribute if isinstance(each, Seam) else "",
)
def test_a_name_that_is_gone_is_told_with_what_is_lost(
    missing: Seam, says: str, seam_sources: Any, sources: Any
) -> None:
    (fault,) = seam_sources._faults_of(sources, missing)
    assert says in fault


@pytest.mark.parametrize(
    ("name", "call", "fits"),
    [
        ("vllm.engine.core.Engine.put", "f(error, at_once=True)", True),
        ("vllm.engine.core.Engine.put", "f(error, True)", False),
        ("vllm.engine.core.Engine.put", "f()", False),
        ("vllm.engine.core.Engine.made", "f(args)", True),
        ("vllm.engine.core.Engine", "f()", True),
        ("vllm.engine.core.Output", "f(tokens, finish=0)", True),
        ("vllm.engine.core.Output", "f(finish=0)", False),
        ("vllm.engine.run", "f(fn)", True),
        ("vllm.engine.gone", "f()", False),
    ],
)
def test_a_call_has_to_fit_the_parameters(name: str, call: str, fits: bool, seam_sources: Any, sources: Any) -> None:
    fault = seam_sources._misfit(sources, name, call)
    assert (fault is None) is fits, fault


def test_what_differs_between_two_sources_is_written_out(
    seam_sources: Any, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    for name, text in MODULES.items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(text.replace("def run(fn)", "def run(fn, late)"))
    monkeypatch.setattr(seam_sources, "CALLS", {"vllm.engine.core.run": "f(fn)", "vllm.engine.core.Engine.put": "f(0)"})
    monkeypatch.setattr(seam_sources, "SEAMS", ())
    assert seam_sources.differences(sources, sources) == []
    (row,) = seam_sources.differences(sources, seam_sources.Sources(other))
    assert row == "vllm.engine.core.run(fn) is run(fn, late)"


def test_a_socket_that_would_stay_open_is_told(seam_sources: Any, tmp_path: Path) -> None:
    module = tmp_path.joinpath(*core_client.RESOURCES.module.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    module.write_text("class BackgroundResources:\n    ctx: object\n    input_socket: object\n    new_socket: object\n")
    (fault,) = seam_sources._unreleased(seam_sources.Sources(tmp_path))
    assert "new_socket" in fault


def test_the_sources_that_are_named_have_all_that_is_used(seam_sources: Any) -> None:
    directory = os.environ.get("VLLM_SOURCES")
    if not directory:
        pytest.skip("VLLM_SOURCES does not name a directory that holds the sources of a vLLM")
    sources = seam_sources.Sources(Path(directory))
    assert sources.tree("vllm") is not None, f"{directory} has no package vllm"
    assert seam_sources.faults(sources) == []
