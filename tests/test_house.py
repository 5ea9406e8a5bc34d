"""The house of `utils/`: rooms on floors. A module imports its own room and the floors below, nothing above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# the ground first; rooms on one floor do not import each other
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
    """Return the modules of `utils/` that a file imports, wherever in it."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[1]


def imports_against_the_floors(imports: dict[str, set[str]]) -> list[str]:
    """Return `importer -> imported` for each import of a higher floor, or of another room on the same one."""
    return [
        f"{importer} -> {imported}"
        for importer, modules in imports.items()
        for imported in modules
        if room(imported) != room(importer) and FLOOR_OF[room(imported)] >= FLOOR_OF[room(importer)]
    ]


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules of which each imports the next and the last the first; none where there is no circle."""
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


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == set(FLOOR_OF)


def test_no_module_imports_against_the_floors():
    assert imports_against_the_floors(IMPORTS) == []


def test_no_modules_import_each_other_in_a_circle():
    assert find_circle(IMPORTS) == []


@pytest.mark.parametrize(
    ("importer", "imported"), [("data.a", "style.b"), ("cli.a", "hub.b"), ("quality.a", "transfer.b")]
)
def test_an_import_against_the_floors_is_found(importer, imported):
    assert imports_against_the_floors({f"utils.{importer}": {f"utils.{imported}"}})
    assert not imports_against_the_floors({"utils.comparison.a": {f"utils.{imported}"}})


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
