#!/usr/bin/env python3
"""Count statements by package, and name the functions that do not fit a screen.

scripts/count_statements.py [--root FOLDER] [--lines 60] [--json]

A statement is a node of `ast.stmt`; comments, line breaks and formatting do not count, a docstring counts one.
A function's length is counted from its `def` to its last line. For an older state of the project:
`git worktree add ../before COMMIT`, then `scripts/count_statements.py --root ../before`.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("src", "benchmarks")


def package_of(path: Path) -> str:
    """Return the folder that a file is counted under: two levels below `src`, the folder itself elsewhere."""
    if path.parts[0] != "src":
        return path.parts[0]
    return "/".join(path.parts[1:3]).removesuffix(".py")


def count_statements(tree: ast.AST) -> int:
    """Return the number of `ast.stmt` nodes of a file or function, at every depth."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def long_functions(tree: ast.AST, lines: int) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function longer than `lines`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > lines:
                yield node.name, length


def measure(root: Path, lines: int) -> dict[str, object]:
    """Return the counts by package, their sum, and `file: function` -> lines of every long function."""
    packages: Counter[str] = Counter()
    functions: dict[str, int] = {}
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    if not paths:
        raise SystemExit(f"error: no Python files under {' or '.join(FOLDERS)} in {root}; name a checkout with --root")
    for path in paths:
        name = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(name))
        packages[package_of(name)] += count_statements(tree)
        functions |= {f"{name.as_posix()}: {function}": length for function, length in long_functions(tree, lines)}
    return {"statements": sum(packages.values()), "packages": dict(sorted(packages.items())), "functions": functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to count")
    parser.add_argument("--lines", type=int, default=60, help="functions longer than this are named")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = measure(arguments.root, arguments.lines)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    packages, functions = result["packages"], result["functions"]
    for name, count in packages.items():
        print(f"{count:7,}  {name}")
    print(f"{result['statements']:7,}  in all")
    print(f"\nfunctions over {arguments.lines} lines: {len(functions)}")
    for name, length in sorted(functions.items(), key=lambda item: -item[1]):
        print(f"{length:7,}  {name}")


if __name__ == "__main__":
    main()
