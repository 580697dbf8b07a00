"""A class of this package as one file that needs none of it: its source with all that it names, word for word, so that
diffusers loads a pipeline folder where ldm_sg is not installed, and there is no second implementation."""

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
HEAD = '"""{name} of {package}, written by it: `{module}` and what it names there, in one file, for diffusers to load."""\n\n'


@lru_cache
def standalone(module: str, name: str) -> str:
    """Source of a file that defines `name` of `module` and imports nothing of this package, but what is imported within a
    function: who calls that needs the package."""
    file = _File()
    file.take(module, name)
    later = ["from __future__ import annotations", ""]  # two parts may name each other
    head = HEAD.format(name=name, package=PACKAGE, module=module) + "\n".join([*later, *sorted(file.imports)])
    # diffusers asks for every package that stands first in a line of imports: not for those that one function in many needs
    parts = [re.sub(r"^( +)(from \S+ import )", r"\1pass; \2", part, flags=re.M) for part in file.parts]
    return "\n\n\n".join([head, *parts]) + "\n"


@dataclass
class _Module:
    """A module's lines, and its top-level statements by the names that they bind."""

    lines: list[str]
    bound: dict[str, ast.stmt]

    def text(self, statement: ast.stmt) -> str:
        """With its decorators, and the comment above it."""
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])


def _path(module: str) -> Path | None:
    spec = find_spec(module) if find_spec(module.rpartition(".")[0]).submodule_search_locations else None
    return Path(spec.origin) if spec and spec.origin else None


@lru_cache
def _module(name: str) -> _Module:
    source = _path(name).read_text()
    bound: dict[str, ast.stmt] = {}
    for statement in ast.parse(source).body:  # a block for type checkers binds nothing
        match statement:
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                bound |= {(alias.asname or alias.name).partition(".")[0]: statement for alias in names}
            case ast.FunctionDef(name=own) | ast.ClassDef(name=own) | ast.AnnAssign(target=ast.Name(id=own)):
                bound[own] = statement
            case ast.Assign(targets=targets):
                bound |= {n.id: statement for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return _Module(source.splitlines(), bound)


class _File:
    """What grows: each part stands after those that it names."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.parts: list[str] = []
        self.owners: dict[str, str] = {}  # name -> its module

    def take(self, module: str, name: str) -> None:
        """Adds what `name` stands for in `module`, once."""
        found = _module(module)
        statement = found.bound[name]
        if isinstance(statement, ast.Import | ast.ImportFrom):
            return self._follow(statement, name)
        names = [other for other, known in found.bound.items() if known is statement]
        if self.owners.get(name) == module:
            return None
        clash = next((n for n in names if n in self.owners), None)
        assert clash is None, f"{clash} is of {module} and of {self.owners.get(clash)}: give one another name"
        self.owners |= dict.fromkeys(names, module)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in found.bound:
                self.take(module, node.id)
        self.parts.append(found.text(statement))

    def _follow(self, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        alias = next(a for a in statement.names if name == (a.asname or a.name).partition(".")[0])
        if isinstance(statement, ast.Import):
            self.imports.add(ast.unparse(ast.Import([alias])))
        elif not statement.module.startswith(f"{PACKAGE}."):
            self.imports.add(ast.unparse(ast.ImportFrom(statement.module, [alias], 0)))
        else:
            named = alias.asname is None and not _path(f"{statement.module}.{alias.name}")
            assert named, (
                f"{name} is {alias.name} of {statement.module}: import functions and classes by their own names"
            )
            self.take(statement.module, name)
