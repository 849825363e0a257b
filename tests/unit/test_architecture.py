"""The layers hold, and the pages that describe the package match it."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from xinf_vllm_backend.settings import Settings, variable

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xinf_vllm_backend"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}

# From the ground floor up. A module imports from its own layer and those below.
LAYERS = (
    ("settings.py", "errors.py", "__version__.py"),
    ("process",),
    ("engine",),
    ("plugin",),
    ("__init__.py", "cli.py", "doctor.py", "demo"),
)
# What only some modules may import.
HOSTS = {
    "vllm": ("engine/seams/",),
    "xinference": ("plugin/", "demo/", "doctor.py"),
    "xoscar": ("plugin/", "demo/", "doctor.py"),
    "fastapi": ("plugin/",),
    "starlette": ("plugin/",),
}


class TestImports:
    @pytest.mark.parametrize("module", SOURCES)
    def test_an_import_never_points_to_a_higher_layer(self, module: str) -> None:
        assert [other for other in _imported(module) if _layer(other) > _layer(module)] == []

    def test_no_modules_import_each_other_in_a_circle(self) -> None:
        graph = {module: set(_imported(module, at_module_level=True)) for module in SOURCES}
        assert list(graphlib.TopologicalSorter(graph).static_order()), "raises CycleError, which shows the circle"

    def test_the_walk_over_imports_sees_every_kind_of_them(self) -> None:
        # Relative, of a package's submodule, for type checkers alone, and inside a function.
        assert "engine/seams/core_client.py" in _imported("engine/supervisor.py", at_module_level=True)
        assert "errors.py" in _imported("engine/supervisor.py", at_module_level=True)
        assert "process/zygote/client.py" in _imported("process/bootstrap.py", at_module_level=True)
        assert "demo/account.py" in _imported("cli.py")
        assert "demo/account.py" not in _imported("cli.py", at_module_level=True)

    @pytest.mark.parametrize("host", HOSTS)
    def test_a_host_is_imported_only_where_it_may_be(self, host: str) -> None:
        importing = {module for module in SOURCES if host in {name.partition(".")[0] for name in _absolute(module)}}
        assert importing, "or this test looks for a name that nobody imports"
        assert [module for module in importing if not module.startswith(HOSTS[host])] == []


class TestPages:
    def test_every_module_has_a_line_in_the_architecture_page(self) -> None:
        described = re.findall(r"^\| `([\w/]+\.py)` \|", PAGES["docs/architecture.md"].read_text(), re.MULTILINE)
        with_code = {module for module, path in SOURCES.items() if len(ast.parse(path.read_text()).body) > 1}
        assert len(described) == len(set(described))
        assert set(described) - {"__version__.py"} == with_code - {"__version__.py"}

    def test_the_readme_links_to_every_page(self) -> None:
        linked = {target for target, _ in _links("README.md")}
        assert [page for page in PAGES if page.startswith("docs/") and page not in linked] == []

    def test_the_first_link_of_the_readme_is_the_architecture(self) -> None:
        assert next(_links("README.md")) == ("docs/architecture.md", "")

    @pytest.mark.parametrize("page", PAGES)
    def test_every_relative_link_leads_somewhere(self, page: str) -> None:
        for target, anchor in _links(page):
            path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
            assert path.exists(), f"{page} links to {target}"
            assert not anchor or anchor in _anchors(path), f"{page} links to {target}#{anchor}"


class TestSettingsPage:
    def test_every_option_is_there_with_its_variable_and_default(self) -> None:
        rows = [cells for cells in _rows("docs/settings.md") if cells[0].strip("`") in Settings.model_fields]
        expected = [
            [f"`{name}`", f"`{variable(name)}`", _shown(field.default)] for name, field in Settings.model_fields.items()
        ]
        assert sorted(row[:3] for row in rows) == sorted(expected)

    def test_every_fixed_value_is_that_of_its_constant(self) -> None:
        rows = [cells for cells in _rows("docs/settings.md") if len(cells) == 4 and cells[1].strip("`") in SOURCES]
        assert rows
        for names, module, values, _ in rows:
            constants = _constants(module.strip("`"))
            actual = [constants.get(name) for name in re.findall(r"`(\w+)`", names)]
            assert actual == [float(value) for value in re.findall(r"[\d.]+", values)], f"{names} in {module}"


def _layer(module: str) -> int:
    first = module.partition("/")[0]
    return next(level for level, members in enumerate(LAYERS) if first in members)


def _imported(module: str, at_module_level: bool = False) -> list[str]:
    """The modules of this package that ``module`` imports."""
    found = (name.removeprefix(f"{PACKAGE.name}.") for name in _absolute(module, at_module_level))
    paths = (name.replace(".", "/") for name in found)
    return [path for name in paths for path in (f"{name}.py", f"{name}/__init__.py") if path in SOURCES]


def _absolute(module: str, at_module_level: bool = False) -> Iterator[str]:
    """Absolute names of all that ``module`` imports: ``a.b`` and ``a.b.c`` for ``from a.b import c``."""
    package = [PACKAGE.name, *module.split("/")[:-1]]
    for node in _nodes(ast.parse(SOURCES[module].read_text()), at_module_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(filter(None, (*base, node.module)))
            submodules = [name for name in (f"{origin}.{alias.name}" for alias in node.names) if _is_module(name)]
            yield from submodules
            if len(submodules) < len(node.names):
                yield origin


def _nodes(node: ast.AST, at_module_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not (at_module_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from _nodes(child, at_module_level)


def _is_module(name: str) -> bool:
    path = name.removeprefix(f"{PACKAGE.name}.").replace(".", "/")
    return f"{path}.py" in SOURCES or f"{path}/__init__.py" in SOURCES


def _constants(module: str) -> dict[str, float]:
    """The literals that ``module`` assigns to names at its top, alone or several in a line."""
    found: dict[str, float] = {}
    for node in ast.parse(SOURCES[module].read_text()).body:
        if isinstance(node, ast.Assign):
            targets, values = (getattr(side, "elts", [side]) for side in (node.targets[0], node.value))
            pairs = zip(targets, values, strict=False)
            for name, value in pairs:
                if isinstance(value, ast.Constant) and isinstance(value.value, (int, float)):
                    found[ast.unparse(name)] = value.value
    return found


def _shown(default: float | str) -> str:
    return default if isinstance(default, str) else f"{default:g}"


def _prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def _links(page: str) -> Iterator[tuple[str, str]]:
    """Target and anchor of each relative link, images included."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(PAGES[page])):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def _anchors(path: Path) -> set[str]:
    """Those of the headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _rows(page: str) -> Iterator[list[str]]:
    for line in PAGES[page].read_text().splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]
