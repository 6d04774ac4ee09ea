"""The files may import each other in one direction only, as the README's file tree says."""
import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = dict(geometry=set(), cameras={"geometry"}, metrics={"geometry"}, encoders=set(), scenes={"geometry"},
               readers=set(), caches={"control", "readers"},
               model={"geometry", "released", "foreign"}, released={"geometry"}, checkpoints={"control", "model"},
               foreign={"checkpoints", "model", "released"}, control=set(), records={"data"},
               draw={"data"},
               evaluate={"control", "foreign", "data", "draw", "geometry", "metrics", "model"},
               page={"data", "geometry"}, jobs={"cameras", "export"},
               export={"cameras", "data", "draw", "geometry", "metrics", "page"},
               verify={"cameras", "data", "geometry", "readers"},
               data={"control", "geometry", "cameras", "scenes", "readers", "caches", "encoders", "verify"},
               plan={"geometry", "model"},
               train={"config", "model", "geometry", "checkpoints", "foreign", "control", "records", "evaluate", "data",
                      "plan"},
               sample={"model", "geometry", "cameras", "foreign", "data", "encoders", "export", "jobs"},
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
    for name, lazy in dict(data={"encoders", "verify"}, model={"foreign"}).items():          # inside a command only
        top = [n for n in ast.parse((ROOT / f"{name}.py").read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not lazy & {m for n in top for m in imports(n)}, name
