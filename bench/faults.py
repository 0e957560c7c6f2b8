"""The small faults that `bench.mutants` plants: mutmut's, in all of a file but prose and annotations."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst  # pyright: ignore[reportMissingImports] - of mutmut, which no extra brings
from libcst.metadata import MetadataWrapper, PositionProvider  # pyright: ignore[reportMissingImports]
from mutmut.mutation.mutators import mutation_operators  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Mutant:
    """One fault: `node` of the module at `path` replaced. It matters where one of `lines` runs."""

    number: int
    path: str
    lines: range
    at_import: bool
    module: Any
    node: Any
    replacement: Any

    @property
    def source(self) -> str:
        return self.module.deep_replace(self.node, self.replacement).code

    @property
    def compiles(self) -> bool:
        try:
            compile(self.source, self.path, "exec")
        except SyntaxError:
            return False
        return True

    def __str__(self) -> str:
        before, after = self.module.code.splitlines(), self.source.splitlines()
        changed = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
        return "\n".join(
            [f"{self.number}  {self.path}:{self.lines[0]}", *(f"    {line}" for line in changed)]
        )


class _Mutations(cst.CSTVisitor):
    """Collects (node, replacement, the lines that have to run, whether they run at import) of a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)
    EXEMPT = (cst.Annotation, cst.Decorator, cst.Raise, cst.FormattedString, cst.Import, cst.ImportFrom)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any, range, bool]] = []
        self._statement: range | None = None
        self._bodies: set[Any] = set()
        self._depth = 0

    def on_visit(self, node: Any) -> bool:
        if isinstance(node, self.EXEMPT) or _is_prose(node):
            return False
        lines = self._statement or self._lines(node)
        for kind, operator in mutation_operators:
            if isinstance(node, kind) and lines:
                self.found += [(node, mutated, lines, self._depth == 0) for mutated in operator(node)]
        if isinstance(node, cst.SimpleStatementLine):
            self._statement = self._lines(node)
        if isinstance(node, cst.FunctionDef | cst.Lambda):
            self._bodies.add(node.body)
        self._depth += node in self._bodies
        return True

    def on_leave(self, original_node: Any) -> None:
        self._depth -= original_node in self._bodies
        if isinstance(original_node, cst.SimpleStatementLine):
            self._statement = None

    def _lines(self, node: Any) -> range | None:
        place: Any = self.get_metadata(PositionProvider, node, None)
        return range(place.start.line, place.end.line + 1) if place else None


def _is_prose(node: Any) -> bool:
    """Docstrings, and the names that a module lists."""
    if isinstance(node, cst.Expr):
        return isinstance(node.value, cst.SimpleString | cst.ConcatenatedString)
    return isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", "") == "__all__"


def mutants_of(root: Path, paths: Iterable[str]) -> list[Mutant]:
    """All mutants of files and folders, given from the root, in a fixed order."""
    found: list[Mutant] = []
    for path in paths:
        place = root / path
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            module = MetadataWrapper(cst.parse_module(file.read_text(encoding="utf-8")))
            visitor = _Mutations()
            module.visit(visitor)
            name = file.relative_to(root).as_posix()
            for node, mutated, lines, at_import in visitor.found:
                found.append(Mutant(len(found), name, lines, at_import, module.module, node, mutated))
    return found


def chosen_of(mutants: Sequence[Mutant], sample: int, seed: int) -> list[Mutant]:
    """`sample` of the mutants that are Python, drawn by `seed`, in the source's order."""
    drawn = random.Random(seed).sample(mutants, len(mutants))
    compiling = (mutant for mutant in drawn if mutant.compiles)
    return sorted((mutant for mutant, _ in zip(compiling, range(sample))), key=lambda each: each.number)  # noqa: B905
