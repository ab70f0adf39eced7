"""The floors of the package: imports point from a higher one to a lower one, and within a floor there is no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ENTRANCES = {REPOSITORY / "mot_hf" / name for name in ("__init__.py", "__main__.py")}
FLOORS = [
    {"version", "terminal", "devices"},
    {"data", "storage", "calibration", "registration", "sizes"},
    {"metrics", "conversion"},
    {"reporting"},
    {"training", "hub", "hub_files", "serving"},
]


def imported_modules(path: Path, package: str) -> set[str]:
    """Full names of what a file imports of a package, at its top and in its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == package}


def room_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "mot_hf").with_suffix("").parts[0]


def rooms_below() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    rooms: dict[str, set[str]] = {}
    for path in (REPOSITORY / "mot_hf").rglob("*.py"):
        if path.parent.name == "modeling" or path in ENTRANCES:
            continue
        names = {name.split(".")[1] for name in imported_modules(path, "mot_hf") if "." in name}
        rooms.setdefault(room_of(path), set()).update(names - {"modeling", room_of(path)})
    return {room: {name for name in names if not name.startswith("MoT")} for room, names in rooms.items()}


def test_every_room_has_a_floor() -> None:
    assert set(rooms_below()) == set().union(*FLOORS)


def test_no_room_imports_from_a_floor_above() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upward = [(room, other) for room, others in rooms_below().items() for other in others
              if floor_of[other] > floor_of[room]]  # fmt: skip
    assert upward == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert list(TopologicalSorter(rooms_below()).static_order())  # raises CycleError


@pytest.mark.parametrize("folder", ["modeling", "mot_hf"])
def test_the_product_knows_nothing_of_the_scripts(folder: str) -> None:
    assert not any(imported_modules(path, "scripts") for path in (REPOSITORY / folder).rglob("*.py"))


def test_storage_needs_no_trainer() -> None:
    paths = (REPOSITORY / "mot_hf" / "storage").rglob("*.py")
    imported = {name for path in paths for name in imported_modules(path, "transformers")}
    assert "transformers.Trainer" not in imported
    assert not [name for name in imported if name.startswith("transformers.trainer.")]
