"""The house in one sentence: a file imports only from below, a name from the file that defines
it."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [
    "geometry wan",
    "encoders",
    "released",
    "model",
    "lib",
    "data",
    "sample",
    "train",  # its evaluation samples
    "bench app",
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names.split()}
PROGRAM = {
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p
    for p in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PROGRAM.items()}


def imports(tree):
    """(module, names) of every import of ours, those inside functions too; names is None for whole
    modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            yield from ((f"lib.{alias.name}", None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]


def test_every_file_has_its_floor_and_imports_only_from_below():
    for name, tree in TREES.items():
        own = FLOOR[name.split(".")[0]]
        for module, _ in imports(tree):
            if module.split(".")[0] in FLOOR:
                height, both_lib = FLOOR[module.split(".")[0]], own == FLOOR["lib"]
                assert height < own or (height == own and both_lib), f"{name} imports {module}"


def test_no_circle_inside_lib():
    below = {name: {m for m, _ in imports(tree) if m in TREES} for name, tree in TREES.items()}
    done = set()
    while len(done) < len(below):
        free = {name for name in below if name not in done and below[name] <= done}
        assert free, f"a circle among {sorted(set(below) - done)}"
        done |= free


def test_every_name_is_imported_from_the_file_that_defines_it():
    for name, tree in TREES.items():
        for module, names in imports(tree):
            if module in TREES and names:
                defined = defined_in(TREES[module])
                assert set(names) <= defined, f"{name}: {sorted(set(names) - defined)} of {module}"


def defined_in(tree):
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.Try):  # a name that moved between versions of torch
            found |= {
                a.asname or a.name
                for n in ast.walk(node)
                if isinstance(n, ast.ImportFrom)
                for a in n.names
            }
    return found


def test_the_model_loads_nothing_of_lib():
    program = (
        "import sys, model; print([m for m in sys.modules if m.split('.')[0] in ('lib', 'data')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
