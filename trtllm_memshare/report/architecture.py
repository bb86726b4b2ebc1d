"""Draws the rooms of the package and the imports between them, from the code as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grimp

from trtllm_memshare.report.plots import plt

FLOORS = (
    ("benchmarks", "build_scripts"),
    ("commands",),
    ("report",),
    ("evaluation",),
    ("triton",),
    ("serving",),
    ("builder",),
    ("runners",),
    ("trtllm", "vllm"),
    ("engine",),
    ("cache", "ranks"),
    ("search",),
)
"""Rooms from the roof to the ground; an import only goes down. ``pyproject.toml`` has the same order as a contract."""

PRODUCT = ("triton", "serving", "builder", "runners", "trtllm", "vllm", "engine", "cache", "ranks", "search")
_GREEN, _SAND, _INK = "#dcebe2", "#f3ead7", "#30404a"


@dataclass(frozen=True)
class Room:
    """A folder. ``lines``: of its Python files; ``imports``: modules that it imports from each other room."""

    name: str
    lines: int
    imports: dict[str, int]


def read_rooms(root: Path) -> list[Room]:
    """The rooms of ``FLOORS`` that exist, in that order.

    Args:
      root: of the repository, on the import path.
    """
    graph = grimp.build_graph("trtllm_memshare", "benchmarks", "build_scripts")
    rooms = []
    for name in (room for floor in FLOORS for room in floor):
        folder = root / name if name in FLOORS[0] else root / "trtllm_memshare" / name
        if not folder.is_dir():
            continue
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))
        imports: dict[str, int] = {}
        for module in graph.modules:
            if _room_of(module) != name:
                continue
            for imported in graph.find_modules_directly_imported_by(module):
                other = _room_of(imported)
                if other not in (name, None):
                    imports[str(other)] = imports.get(str(other), 0) + 1
        rooms.append(Room(name, lines, imports))
    return rooms


def draw_rooms(rooms: list[Room], path: Path) -> None:
    """A box for each room, one floor above the other, and an arrow for each import that no other arrows imply."""
    figure, axis = plt.subplots(figsize=(7, 8.5))
    places = _place(rooms)
    for room in rooms:
        x, y = places[room.name]
        color = _GREEN if room.name in PRODUCT else _SAND
        style = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": _INK, "linewidth": 0.8}
        label = f"{room.name}/\n{room.lines:,} lines"
        axis.text(x, y, label, ha="center", va="center", fontsize=9, color=_INK, bbox=style, zorder=3)
        for other in direct_imports(room, rooms):
            width = 0.7 + min(room.imports[other], 30) / 15
            line = {"arrowstyle": "-|>", "color": _INK, "alpha": 0.6, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", xy=_edge(places[other], (x, y)), xytext=(x, y), arrowprops=line, zorder=1)
    axis.set_xlim(-1.3, 1.3)
    axis.set_ylim(-0.7, max(y for _, y in places.values()) + 0.7)
    axis.axis("off")
    axis.set_title("Rooms: an import only goes down (green: what serves)", fontsize=10, color=_INK)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def direct_imports(room: Room, rooms: list[Room]) -> list[str]:
    """Rooms that ``room`` imports and that none of the others it imports leads to: what a picture has to show."""
    by_name = {other.name: other for other in rooms}

    def below(name: str) -> set[str]:
        return {name}.union(*(below(other) for other in by_name[name].imports if other in by_name))

    imported = [name for name in room.imports if name in by_name]
    return [name for name in imported if not any(name in below(other) for other in imported if other != name)]


def _room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "trtllm_memshare":
        return parts[0]
    return parts[1] if len(parts) > 2 else None


def _place(rooms: list[Room]) -> dict[str, tuple[float, float]]:
    known = {room.name for room in rooms}
    places = {}
    for height, floor in enumerate(reversed(FLOORS)):
        present = [name for name in floor if name in known]
        for index, name in enumerate(present):
            # Floors swing from side to side, so that an arrow to a floor further down does not hide behind a box.
            x = 1.2 * (index - (len(present) - 1) / 2) + (0.75 if height % 2 else -0.75) * (len(present) == 1)
            places[name] = (x, float(height))
    return places


def _edge(center: tuple[float, float], toward: tuple[float, float]) -> tuple[float, float]:
    """Where a line from ``toward`` meets the box around ``center``."""
    half_width, half_height = 0.21, 0.4
    dx, dy = toward[0] - center[0], toward[1] - center[1]
    share = min(half_width / abs(dx) if dx else 1.0, half_height / abs(dy) if dy else 1.0)
    return center[0] + share * dx, center[1] + share * dy
