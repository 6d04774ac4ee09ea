"""The files may import each other in one direction only, as the README's file tree says."""
import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# The method, then what stands around it in lib/.
ALLOWED = dict(geometry="", encoders="", model="geometry released foreign",
               data="geometry encoders control cameras scenes readers caches verify",
               train="config model geometry data checkpoints foreign control records evaluate plan sharding",
               sample="model geometry data encoders cameras foreign export jobs",
               bench="data encoders evaluate gpu model plan sample train variants")
LIB = dict(released="geometry", cameras="geometry", metrics="geometry", scenes="geometry", readers="", control="",
           caches="control readers", checkpoints="control model sharding", sharding="",
           foreign="checkpoints model released sharding",
           variants="encoders geometry model plan sample train", gpu="encoders model plan sample train variants",
           plan="geometry model sharding", verify="cameras data geometry readers", records="data", draw="data",
           page="data geometry", export="cameras data draw geometry metrics page", jobs="cameras export",
           evaluate="control foreign data draw geometry metrics model")
LAZY = dict(data={"encoders", "verify"}, model={"foreign"})               # imported inside a command only


def imports(node):
    """Names of the files that a syntax tree imports, without the folder."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (name.name.split(".")[-1] for name in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module == "lib":
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.split(".")[child.module.startswith("lib.")]


def test_import_directions():
    files = {ROOT / f"{name}.py": allowed for name, allowed in ALLOWED.items()}
    files |= {ROOT / "lib" / f"{name}.py": allowed for name, allowed in LIB.items()}
    assert set(files) == {p for p in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")] if p.name != "__init__.py"}
    ours = {path.stem for path in files} | {"config"}
    for path, allowed in files.items():
        tree = ast.parse(path.read_text())
        assert set(imports(tree)) & ours <= set(allowed.split()), path
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not LAZY.get(path.stem, set()) & {name for node in top for name in imports(node)}, path
