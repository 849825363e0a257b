"""Checks the private names of vLLM in its sources, which are read and not imported.

``python -m tests.seam_sources DIRECTORY`` prints what is wrong with the ``vllm`` in a directory and exits with 1 if
anything is. ``--against OTHER`` also prints the parameters that are not the same in the ``vllm`` in another directory.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xinf_vllm_backend.engine.seams import SEAMS, Seam, core_client

# How this package calls what the seams name, by hand or as what takes its place.
CALLS = {
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": "f(context)",
    "vllm.lora.request.LoRARequest": "f(lora_name, lora_int_id, lora_path)",
    "vllm.logger._configure_vllm_root_logger": "f()",
    "vllm.model_executor.models.registry._run_in_subprocess": "f(fn)",
    "vllm.renderers.base.BaseRenderer.clear_mm_cache_async": "f()",
    "vllm.utils.system_utils.get_mp_context": "f()",
    "vllm.v1.engine.EngineCoreOutput": "f(request_id, tokens, new_logprobs=0, finish_reason=0, prefill_stats=0)",
    "vllm.v1.engine.EngineCoreOutputs": "f(outputs=0)",
    "vllm.v1.engine.async_llm.AsyncLLM.abort": "f(request_ids, internal=True)",
    "vllm.v1.engine.async_llm.AsyncLLM.collective_rpc": "f('reload_weights')",
    "vllm.v1.engine.async_llm.AsyncLLM.from_engine_args": "f(engine_args)",
    "vllm.v1.engine.async_llm.AsyncLLM.pause_generation": "f(mode=0, clear_cache=0)",
    "vllm.v1.engine.async_llm.AsyncLLM.resume_generation": "f()",
    "vllm.v1.engine.async_llm.AsyncLLM.sleep": "f(level=0, mode=0)",
    "vllm.v1.engine.async_llm.AsyncLLM.wake_up": "f()",
    "vllm.v1.engine.core_client.AsyncMPClient._call_utility_async": "f(method, engine=0)",
    "vllm.v1.engine.core_client.AsyncMPClient.abort_requests_async": "f(request_ids)",
    "vllm.v1.engine.core_client.AsyncMPClient.add_request_async": "f(request)",
    "vllm.v1.engine.core_client.AsyncMPClient.get_output_async": "f()",
    "vllm.v1.engine.core_client.AsyncMPClient.is_scheduler_paused_async": "f()",
    "vllm.v1.engine.core_client.AsyncMPClient.shutdown": "f(timeout=0)",
    f"{core_client.CLIENT.module}.{core_client.CLIENT.attribute}": "f(vllm_config=0, executor_class=0, log_stats=0)",
    "vllm.v1.engine.output_processor.OutputProcessor.abort_requests": "f(request_ids, internal=True)",
    "vllm.v1.engine.output_processor.RequestOutputCollector.put": "f(error)",
    "vllm.v1.executor.abstract.Executor.get_class": "f(config)",
    "vllm.v1.metrics.stats.PrefillStats": "f(num_prompt_tokens=0, num_cached_tokens=0)",
    "vllm.v1.outputs.LogprobsLists": "f(ids, logprobs, ranks)",
    "vllm.v1.structured_output.StructuredOutputManager._create_grammar": "f(request)",
    "vllm.v1.structured_output.StructuredOutputManager._get_reasoner": "f(request)",
}


@dataclass(frozen=True)
class Named:
    """What a name stands for: where it is written, and as what.

    Attributes:
        module: the name of the module.
        node: a definition, an assigned value or a whole module; None for what the sources do not hold.
        bound: whether a call of it leaves the first parameter out.
    """

    module: str
    node: ast.AST | None
    bound: bool = False


class Sources:
    """The sources of vLLM in a directory that holds the package ``vllm``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @functools.cache  # noqa: B019 - one or two of them, as long as the process
    def tree(self, module: str) -> ast.Module | None:
        path = self._directory.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def find(self, module: str, attribute: str = "") -> Named | None:
        """What ``attribute``, with dots, stands for in a module; the module itself where that is empty."""
        tree = self.tree(module)
        found = None if tree is None else Named(module, tree)
        for name in filter(None, attribute.split(".")):
            found = found and self._attribute(found, name)
        return found

    def signature(self, named: Named) -> inspect.Signature | None:
        """The parameters of a call; None of what cannot be called, or whose parameters the sources do not hold."""
        if isinstance(named.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _signature(named.node.args, named.bound)
        if isinstance(named.node, ast.ClassDef):
            init = self._attribute(named, "__init__")
            return self.signature(init) if init else inspect.Signature(_in_order(self._fields(named)))
        return None

    def _attribute(self, of: Named, name: str) -> Named | None:
        if isinstance(of.node, ast.Module):
            return self._in_module(of, name)
        if isinstance(of.node, ast.ClassDef):
            return self._in_class(of, name)
        if isinstance(of.node, ast.Call):  # an instance, of the class that is called
            cls = self._value(of.module, of.node.func)
            return cls and self._attribute(cls, name)
        return Named(of.module, None) if of.node is None else None

    def _in_module(self, of: Named, name: str) -> Named | None:
        found = None
        for statement in _statements(of.node):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                found = self._imported(of.module, statement, name) or found
            elif name in _names(statement):
                found = self._defined(of.module, statement)
        return found or self.find(f"{of.module}.{name}")

    def _in_class(self, of: Named, name: str) -> Named | None:
        assert isinstance(of.node, ast.ClassDef)
        for statement in reversed(list(_statements(of.node))):
            if name in _names(statement):
                return self._defined(of.module, statement, in_class=True)
            if getattr(statement, "name", "") == "__init__" and name in _set_on_instances(statement):
                return Named(of.module, None)
        bases = (self._value(of.module, base) for base in of.node.bases)
        return next((found for base in bases if base and base.node and (found := self._attribute(base, name))), None)

    def _imported(self, module: str, statement: ast.Import | ast.ImportFrom, name: str) -> Named | None:
        for alias in statement.names:
            if name != (alias.asname or alias.name.partition(".")[0]):
                continue
            if isinstance(statement, ast.Import):
                return self.find(alias.name if alias.asname else name) or Named(name, None)
            origin = self._origin(module, statement)
            if not origin.startswith("vllm"):
                return Named(origin, None)
            return self.find(origin, alias.name)
        return None

    def _origin(self, module: str, statement: ast.ImportFrom) -> str:
        """The module that names are imported from."""
        if not statement.level:
            return statement.module or ""
        path = module.split(".")
        is_package = self._directory.joinpath(*path, "__init__.py").is_file()
        parents = path[: len(path) - statement.level + is_package]
        return ".".join([*parents, *filter(None, [statement.module])])

    def _defined(self, module: str, statement: ast.AST, in_class: bool = False) -> Named:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            value = statement.value
            named = self._value(module, value) if isinstance(value, ast.Name | ast.Attribute) else None
            return named or Named(module, value if isinstance(value, ast.Call) else None)
        decorators = getattr(statement, "decorator_list", ())
        is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in decorators)
        return Named(module, statement, bound=in_class and not is_static)

    def _value(self, module: str, node: ast.AST) -> Named | None:
        """What an expression of names stands for."""
        if isinstance(node, ast.Subscript):  # a generic class
            return self._value(module, node.value)
        if isinstance(node, ast.Attribute):
            owner = self._value(module, node.value)
            return owner and self._attribute(owner, node.attr)
        return self.find(module, node.id) if isinstance(node, ast.Name) else None

    def _fields(self, named: Named) -> dict[str, inspect.Parameter]:
        """The fields of a class whose ``__init__`` is made from them, those of its bases first."""
        assert isinstance(named.node, ast.ClassDef)
        fields: dict[str, inspect.Parameter] = {}
        for base in named.node.bases:
            found = self._value(named.module, base)
            if found is not None and isinstance(found.node, ast.ClassDef):
                fields.update(self._fields(found))
        for statement in named.node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = _parameter(statement.target.id, statement.value is not None)
        return fields


def faults(sources: Sources) -> list[str]:
    """What a vLLM of these sources lacks of what this package uses, one sentence each; empty where all is there."""
    missing = [fault for seam in SEAMS if seam.module.startswith("vllm.") for fault in _faults_of(sources, seam)]
    misfits = [fault for name, call in CALLS.items() if (fault := _misfit(sources, name, call))]
    return missing + misfits + list(_unreleased(sources))


def differences(sources: Sources, others: Sources) -> list[str]:
    """The seams whose parameters are not the same in two sources, both written out."""
    rows = []
    for name in sorted({*CALLS, *(f"{seam.module}.{seam.attribute}" for seam in SEAMS)}):
        one, other = (
            (found and each.signature(found)) for each in (sources, others) for found in [_look_up(each, name)]
        )
        if one and other and str(one) != str(other):
            rows.append(f"{name}{one} is {name.rpartition('.')[2]}{other}")
    return rows


def _faults_of(sources: Sources, seam: Seam) -> Iterator[str]:
    places = ((seam.module, seam.attribute), *seam.moved)
    found = next((named for place in places if (named := sources.find(*place))), None)
    if found is None:
        yield f"{seam.module}.{seam.attribute} is gone: {seam.without}."
        return
    for member in seam.members:
        if sources._attribute(found, member) is None:
            yield f"{seam.module}.{seam.attribute} has no {member}: {seam.without}."


def _misfit(sources: Sources, name: str, call: str) -> str | None:
    found = _look_up(sources, name)
    signature = None if found is None else sources.signature(found)
    if signature is None:
        is_said = found is None and any(name.startswith(f"{seam.module}.{seam.attribute}") for seam in SEAMS)
        return None if is_said else f"{name} is gone, or is no longer called."
    called = ast.parse(call, mode="eval").body
    assert isinstance(called, ast.Call)
    try:
        signature.bind(*called.args, **{str(keyword.arg): keyword.value for keyword in called.keywords})
    except TypeError as error:
        return f"{name}{signature} cannot be called as {call}: {error}."
    return None


def _unreleased(sources: Sources) -> Iterator[str]:
    """What an engine's client holds in the process, and is not released with it."""
    resources = sources.find(core_client.RESOURCES.module, core_client.RESOURCES.attribute)
    signature = resources and sources.signature(resources)
    for name in signature.parameters if signature else ():
        if name.endswith(("_socket", "_sockets", "_task")) and name not in core_client.HELD:
            yield f"{core_client.RESOURCES.attribute} holds {name}, which is not released."


def _look_up(sources: Sources, name: str) -> Named | None:
    module, *rest = name.split(".")
    while rest and sources.tree(f"{module}.{rest[0]}") is not None:
        module, rest = f"{module}.{rest[0]}", rest[1:]
    return sources.find(module, ".".join(rest))


def _statements(node: ast.AST | None) -> Iterator[ast.AST]:
    """The statements of a module or class, also those under ``if``, ``try`` and ``with``."""
    for part in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, part, ()):
            yield statement
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _statements(statement)


def _names(statement: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _set_on_instances(init: ast.AST) -> set[str]:
    stores = (node for node in ast.walk(init) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stores if isinstance(node.value, ast.Name) and node.value.id == "self"}


def _parameter(name: str, has_default: bool, kind: inspect._ParameterKind | None = None) -> inspect.Parameter:
    default = "..." if has_default else inspect.Parameter.empty
    return inspect.Parameter(name, kind or inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def _in_order(fields: dict[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """Those with a default last, as in any signature; they stand before others where a base has them."""
    return sorted(fields.values(), key=lambda field: field.default is not inspect.Parameter.empty)


def _signature(arguments: ast.arguments, bound: bool) -> inspect.Signature:
    kinds = inspect.Parameter
    named = [*arguments.posonlyargs, *arguments.args]
    first_default = len(named) - len(arguments.defaults)
    parameters = [
        _parameter(argument.arg, has_default=number >= first_default) for number, argument in enumerate(named)
    ][bound:]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(argument.arg, default is not None, kinds.KEYWORD_ONLY))
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    sources = Sources(given.directory)
    if sources.tree("vllm") is None:
        parser.error(f"{given.directory} has no package vllm; name the directory that holds it.")
    found = faults(sources)
    print("\n".join(found) or f"All {len(SEAMS)} private names and {len(CALLS)} calls of them fit.")
    if given.against:
        print(*differences(sources, Sources(given.against)), sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
