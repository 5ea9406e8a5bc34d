"""The layers of `utils/`: a module imports only its own package and the layers below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# the lowest first; packages on one layer do not import each other
FLOORS = (
    ("cli",),
    ("hub",),
    ("data",),
    ("forecast",),
    ("style",),
    ("synthesis",),
    ("quality", "transfer", "review"),
    ("comparison",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "utils").rglob("*.py")
    if path.name != "__init__.py"
}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of `utils/` that a file imports anywhere."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[1]


def find_upward_imports(imports: dict[str, set[str]]) -> list[str]:
    """Return `importer -> imported` for each import of a higher layer, or of another package on the same layer."""
    return [
        f"{importer} -> {imported}"
        for importer, modules in imports.items()
        for imported in modules
        if room(imported) != room(importer) and FLOOR_OF[room(imported)] >= FLOOR_OF[room(importer)]
    ]


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules of which each imports the next and the last the first; empty without a cycle."""
    done = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        circles = (visit(other, [*way, module]) for other in sorted(imports[module] - done))
        circle = next(filter(None, circles), [])
        done.add(module)
        return circle

    return next(filter(None, (visit(module, []) for module in imports)), [])


IMPORTS = {module: imported_modules(path) for module, path in MODULES.items()}


def test_every_package_has_its_layer():
    assert {room(module) for module in MODULES} == set(FLOOR_OF)


def test_no_module_imports_a_higher_layer():
    assert find_upward_imports(IMPORTS) == []


def test_no_modules_import_each_other_in_a_cycle():
    assert find_cycle(IMPORTS) == []


@pytest.mark.parametrize(
    ("importer", "imported"), [("data.a", "style.b"), ("cli.a", "hub.b"), ("quality.a", "transfer.b")]
)
def test_an_import_of_a_higher_layer_is_found(importer, imported):
    assert find_upward_imports({f"utils.{importer}": {f"utils.{imported}"}})
    assert not find_upward_imports({"utils.comparison.a": {f"utils.{imported}"}})


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
