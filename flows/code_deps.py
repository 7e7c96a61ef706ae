"""The source files that a stage's module imports, which dvc.yaml names as its deps: a change there makes it run again.

`python -m flows.code_deps` says what is missing or too much in dvc.yaml; with `--write` it puts that right.
"""

from __future__ import annotations

import ast
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.files import write_text
from flows.pipeline import METHODS, entry
from flows.stage import STAGES
from flows.values import yaml

ITEM = "${item}"
ROOMS = ("flows", "models", "feedback")


def import_closure(root: Path, module: str) -> list[str]:
    """The files of this repository that `module` imports, directly or not, inside functions too; itself included.

    Paths are relative to `root`, sorted. A package's __init__.py counts when it holds more than a docstring. Imports under
    `if TYPE_CHECKING` do not count: they never run.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        for part in _with_packages(name):
            path = _file(root, part)
            if part not in found and path is not None:
                found[part] = path
                waiting += _imports(path, part)
    return sorted(str(path.relative_to(root)) for path in found.values() if not _is_bare(path))


def _with_packages(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _file(root: Path, module: str) -> Path | None:
    if module.split(".")[0] not in ROOMS:
        return None
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(path: Path, module: str) -> Iterator[str]:
    """Every module named by an import statement; `from a import b` may mean the module a.b, so both are given."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _running(other)
            continue
        yield child
        yield from _running(child)


def _is_bare(path: Path) -> bool:
    """Whether an __init__.py holds nothing but a docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return path.name == "__init__.py" and all(
        isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body
    )


def expected(root: Path) -> dict[str, list[str]]:
    """Every stage with the source files that its dvc.yaml entry should name.

    The methods have one entry, with ITEM for the method's name: each names its own file, and all that any of them imports.
    """
    found = {name: import_closure(root, body.module) for name, body in STAGES.items()}
    own = {name: f"models/{name}.py" for name in METHODS}
    shared = {path for name in METHODS for path in found[name]} - set(own.values())
    return found | {name: sorted([*shared, own[name]]) for name in METHODS}


def declared(root: Path) -> dict[str, list[str]]:
    """Every stage of dvc.yaml with the source files that it names."""
    document = yaml().load((root / "dvc.yaml").read_text(encoding="utf-8"))
    return {
        name: sorted(dep.replace(ITEM, name) for dep in _deps(document, name) if dep.endswith(".py")) for name in STAGES
    }


def _deps(document: Any, name: str) -> Any:
    """The list of a stage's deps in dvc.yaml, to read or to change; [] for a stage that it lacks."""
    stages = document["stages"]
    if name in METHODS:
        return stages.get(entry(name).split("@")[0], {}).get("do", {}).get("deps", [])
    return stages.get(name, {}).get("deps", [])


def write(root: Path) -> None:
    """Rewrite the source files among the deps of dvc.yaml; data deps, comments and order stay."""
    path = root / "dvc.yaml"
    document = yaml().load(path.read_text(encoding="utf-8"))
    for name, files in expected(root).items():
        deps = _deps(document, name)
        for dep in [dep for dep in deps if dep.endswith(".py")]:
            deps.remove(dep)
        own = f"models/{name}.py" if name in METHODS else None
        deps.extend(f"models/{ITEM}.py" if path == own else path for path in files)
    text = io.StringIO()
    yaml().dump(document, text)
    if text.getvalue() != path.read_text(encoding="utf-8"):
        write_text(path, text.getvalue())


def main() -> int:
    """The command. Exit status 1 when dvc.yaml differs and is not to be written."""
    root = Path.cwd()
    if "--write" in sys.argv[1:]:
        write(root)
    wrong = 0
    for name, files in expected(root).items():
        have = declared(root).get(name, [])
        for path in sorted({*files} ^ {*have}):
            print(f"dvc.yaml: stage {name} {'does not name' if path in files else 'should not name'} {path}")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
