"""What ``xinf-vllm doctor`` checks and advises."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from packaging.specifiers import SpecifierSet

from .engine import preload
from .engine.seams import SEAMS, Seam, start, version
from .plugin import across, generations, model_watch, named_parsers, relaunch, sub_pools, weight_cache, xavier
from .plugin.push import api_side, model_side, served
from .plugin.xinference_version import SUPPORTED as XINFERENCE
from .process import tree

ENTRY = "xinf_vllm_backend:extension"
PYTHON = SpecifierSet(">=3.10")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        subject: what it is.
        found: what was found.
        ok: False where launches or requests fail because of it.
        advice: what to do, or what is lost.
        degraded: whether everything works but something is lost.
    """

    subject: str
    found: str
    ok: bool = True
    advice: str = ""
    degraded: bool = False

    def as_dict(self) -> dict[str, str | bool]:
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Check everything, each thing after those that it needs."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to stdout, where our findings go
    return [
        *_versions(),
        *_extension(),
        *_seams(),
        _model_processes(),
        _guarded("cancels that come when the launch is over", "end the model", sub_pools.CANCELLING),
        _guarded("model processes that hang", "found and killed by their worker", model_watch.SEAMS),
        _guarded("models whose process dies", "launched again within a budget", relaunch.SEAMS),
        _guarded("models across several workers", "launched again as a whole", across.SEAMS),
        _guarded("models with a Xavier cache", "hosted like others", xavier.SEAMS),
        _guarded("reloads of running models", "by a process beside the old one", generations.SEAMS),
        _guarded("vLLM's parsers of tool calls and reasoning", "used where a launch names one", named_parsers.SEAMS),
        _guarded("checkpoints in a weight cache", "known by their checksums", weight_cache.SEAMS),
        _streams(),
        _requests(),
        _start_method(),
        _waiting(),
        _virtualenv(),
    ]


def table(findings: list[Finding]) -> str:
    """The findings as text, one row each."""
    from tabulate import tabulate

    rows = [
        (
            "WRONG" if not finding.ok else "degraded" if finding.degraded else "ok",
            textwrap.fill(finding.subject, 60, break_long_words=False),
            textwrap.fill(finding.found, 60),
            textwrap.fill(finding.advice, 50),
        )
        for finding in findings
    ]
    return str(tabulate(rows, headers=("", "what", "found", "what to do")))


def _versions() -> Iterator[Finding]:
    yield _version("Python", ".".join(map(str, sys.version_info[:3])), PYTHON)
    yield _version("xinference", _installed("xinference"), XINFERENCE)
    yield _version("vLLM", version.version(), version.SUPPORTED)
    yield _version("torch", _installed("torch"), SpecifierSet())
    yield _version("xoscar", _installed("xoscar"), SpecifierSet())


def _version(name: str, found: str | None, supported: SpecifierSet) -> Finding:
    if found is None:
        advice = "install it: pip install 'xinf_vllm_backend[vllm]', or '[cpu]' on a host without GPUs"
        return Finding(name, "not found", False, advice)
    if not version.is_supported(found, supported):
        return Finding(name, found, False, f"install a version in the supported range {supported}")
    return Finding(name, f"{found} (supported: {supported or 'any'})")


def _extension() -> Iterator[Finding]:
    configured = os.environ.get("XINFERENCE_EXTENSIONS", "")
    if ENTRY not in (entry.replace(" ", "") for entry in configured.split(",")):
        advice = f"set XINFERENCE_EXTENSIONS={ENTRY} for every Xinference process, on every node"
        yield Finding("XINFERENCE_EXTENSIONS", configured or "not set", False, advice)
        return
    yield Finding("XINFERENCE_EXTENSIONS", configured)
    try:
        behind = _classes_behind_vllm()
    except Exception as error:  # whatever it is, Xinference meets it, too
        yield Finding('class behind "vLLM"', f"{type(error).__name__}: {error}", False, "fix the import error first")
        return
    foreign = sorted(name for name in behind if not name.startswith(f"{__package__}."))
    ok = bool(behind) and not foreign
    advice = "" if ok else "another extension puts its own classes there: remove it from XINFERENCE_EXTENSIONS"
    yield Finding('class behind "vLLM"', ", ".join(sorted(behind)) or "none", ok, advice)


def _classes_behind_vllm() -> set[str]:
    import xinference.model  # noqa: F401 - Xinference's own registration comes first, as in its services
    from xinference.extensions import get_extensions
    from xinference.model.llm.llm_family import LLM_ENGINES

    get_extensions()
    found = (entry["llm_class"] for engines in LLM_ENGINES.values() for entry in engines.get("vLLM", ()))
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in found}


def _seams() -> Iterator[Finding]:
    for seam in SEAMS:
        there = seam.present()
        found = f"for {seam.used_for}" if there else "gone"
        advice = "" if there else f"without it: {seam.without}" + _remedy(seam)
        yield Finding(f"seam {seam.name}", found, there or not seam.vital, advice, not there and not seam.vital)


def _remedy(seam: Seam) -> str:
    if not version.is_supported(version.version() or "", version.SUPPORTED):
        return f"; use a vLLM in {version.SUPPORTED}"
    return f"; report it, and use another vLLM in {version.SUPPORTED}" if seam.vital else ""


def _model_processes() -> Finding:
    reason = sub_pools.why_spawned()
    running = ", ".join(f"pid {process.pid}" for process in sub_pools.running_host_zygotes())
    found = f"forked from a host zygote ({running or 'none is running'})" if reason is None else f"spawned: {reason}"
    lost = _lost(reason, sub_pools.SUB_POOL)
    return Finding("model processes", found, True, lost, degraded=bool(lost))


def _streams() -> Finding:
    reason = _streams_reason()
    found = "pushed to the API by a link" if reason is None else f"pulled item by item: {reason}"
    lost = _lost(reason, api_side.GET_SUPERVISOR)
    return Finding("streams", found, True, lost, degraded=bool(lost))


def _requests() -> Finding:
    reason = _streams_reason() or api_side.why_not_failed_over() or model_side.why_not_failed_over()
    found = "outlive their model process" if reason is None else f"end with their model process: {reason}"
    lost = _lost(reason, served.STATUSES)
    return Finding("requests", found, True, lost, degraded=bool(lost))


def _streams_reason() -> str | None:
    return api_side.why_pulled() or model_side.why_pulled()


def _lost(reason: str | None, seam: Seam) -> str:
    """What is lost for ``reason``; nothing where there is none, or where it was switched off."""
    return "" if reason is None or "is off" in reason else f"without it: {seam.without}"


def _guarded(subject: str, found: str, seams: Sequence[Seam]) -> Finding:
    """What names of Xinference give, all together."""
    gone = ", ".join(seam.name for seam in seams if not seam.present())
    lost = f"without it: {seams[0].without}" if gone else ""
    return Finding(subject, f"there is no {gone}" if gone else found, True, lost, degraded=bool(gone))


def _start_method() -> Finding:
    method = start.start_method()
    return Finding(
        "start method of engine processes",
        preload.resolve("auto") if method == "spawn" else method or "unknown: vLLM cannot be imported",
        method == "spawn",
        "" if method == "spawn" else "engine processes would be forked from a process with threads",
    )


def _waiting() -> Finding:
    return Finding("ends of engine processes awaited by", tree.waits_by())


def _virtualenv() -> Finding:
    uv = shutil.which("uv")
    advice = "install uv, or launch with --enable-virtual-env false"
    wanted = os.environ.get("XINFERENCE_ENABLE_VIRTUAL_ENV", "1") not in ("0", "false", "False")
    ok = uv is not None or not wanted
    return Finding("uv, for Xinference's virtualenv mode", uv or "not found", ok, "" if ok else advice)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
