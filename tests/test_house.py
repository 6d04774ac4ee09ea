"""The house: every file is found by its name, short enough to be read, and says why it does what it
does."""

import ast
import io
import pathlib
import subprocess
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
METHOD = dict(
    geometry=900,
    wan=500,
    encoders=700,
    # The Wan2.2 release: 47 more, its tiles.  Its pair of experts is in lib/.
    released=377,
    model=680,
    data=700,
    train=680,
    sample=650,  # experts, ranks that share, benchmarks, pieces that app.py and train.py call
    bench=400,
    app=250,
)
LIB = 5_900 + 4_043  # all of lib/ together; see WHOLE
LIB_FILE = 480
# The design's 11,500 is exceeded by 5,088.  It had not counted 22 layouts to import (layouts,
# recordings, importers, lens: 1,000), 27 mistakes that the doctor names instead of 12 (suspects:
# 150 more), the readers of lib/native.py (255), pictures of the ground truth (look: 120), Muon
# (115), EXR, PFM and PGM (190), mixes of datasets (95), lists of samples and their ranks (230),
# several machines (50), the release on Wan2.2 (490: experts, lora, its part of released, end
# images), sampled worlds (sampled, align, worldscore: 500), the page in the browser (app, webpage:
# 375), offloading that overlaps (190), gradients in DDP's buckets (60), strangers' checkpoints and
# decoded sizes (180), habits of those who import, sample and resume (tests/test_habits.py, 160),
# and what made, scores and ablates the miniature (tiny/: 670, left out of this sum till December).
WHOLE = 11_500 + 5_088
LONGER = {"train.main": 150}  # functions that may be longer than 60 lines: the recipe
PROGRAM = sorted(f for d in (".", "lib", "config", "tiny") for f in ROOT.glob(f"{d}/*.py"))


def length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", METHOD)
def test_a_file_of_the_method_keeps_its_budget(name):
    assert length(ROOT / f"{name}.py") <= METHOD[name]


def test_lib_and_the_whole_program_keep_their_budgets():
    lib = {path.name: length(path) for path in ROOT.glob("lib/*.py")}
    assert not {name: n for name, n in lib.items() if n > LIB_FILE}
    assert sum(lib.values()) <= LIB
    assert sum(map(length, PROGRAM)) <= WHOLE


def test_a_test_file_keeps_its_budget():
    lengths = {path.name: length(path) for path in ROOT.glob("tests/*.py")}
    assert not {name: n for name, n in lengths.items() if n > 400}


def functions():
    """(where, node) of every function of the program, methods and inner ones too."""
    for path in PROGRAM:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.stem}.{node.name}", node


def test_functions_fit_a_screen():
    long = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    assert not {where: n for where, n in long.items() if n > LONGER.get(where, 60)}


# The design names the arguments of the two forwards; the sizes of a network are a list of numbers.
WIDER = {"model.forward", "wan.forward", "wan.__init__"}


def test_functions_take_at_most_seven_parameters():
    wide = {}
    for where, node in functions():
        a = node.args
        count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
        count -= bool(a.args) and a.args[0].arg in ("self", "cls")
        if count > 7 and where not in WIDER:
            wide[where] = count
    assert not wide


@pytest.mark.parametrize("name", ["model", "wan", "geometry", "train", "data", "sample"])
def test_comments_are_a_tenth_of_the_method(name):
    """Lines that are a comment or end in one, of all lines that are not blank."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    assert len(commented) >= 0.1 * len(lines), f"{len(commented)} of {len(lines)} lines"


def test_no_line_is_wider_than_a_hundred_columns():
    files = [*PROGRAM, *ROOT.glob("tests/*.py")]
    wide = {
        f"{path.relative_to(ROOT)}:{n}": len(line)
        for path in files
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    }
    assert not wide


def test_the_root_holds_the_program_and_nothing_that_a_commit_swept_up():
    """Seen: wheels of pip download in the root, swept up by git add -A."""
    told = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = map(pathlib.PurePath, told.stdout.split("\n")[:-1])  # none where git is not
    other = {p.suffix for p in names if len(p.parts) == 1 and p.name[0] != "."}
    assert other <= {"", ".md", ".py", ".sh", ".toml", ".txt"}
