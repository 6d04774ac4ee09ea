"""The files may import each other in one direction only, as the README's file tree says."""
import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = dict(geometry=set(), cameras={"geometry"}, metrics={"geometry"}, encoders=set(), scenes={"geometry"},
               model={"geometry"}, checkpoints={"model"}, evaluate={"data", "geometry", "metrics", "model"},
               verify={"cameras", "data", "geometry"},
               data={"geometry", "cameras", "scenes", "encoders", "verify"},
               plan={"geometry", "model"},
               train={"config", "model", "geometry", "checkpoints", "evaluate", "data", "plan"},
               sample={"model", "geometry", "checkpoints", "data", "encoders"},
               bench={"data", "encoders", "evaluate", "geometry", "model", "plan", "sample", "train"})


def imports(node):
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (name.name.split(".")[0] for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.split(".")[0]


def test_import_directions():
    ours = set(ALLOWED) | {"config"}
    for name, allowed in ALLOWED.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert set(imports(tree)) & ours <= allowed, name
    top = [n for n in ast.parse((ROOT / "data.py").read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not {"encoders", "verify"} & {m for n in top for m in imports(n)}, "encode() and verify() import these"
