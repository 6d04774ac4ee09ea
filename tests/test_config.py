"""Options: one system, whose errors name the file, the line, the key and the cure."""

import pathlib

import pytest

import config
import sample
import train
from config import option

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = dict(
    __doc__="Do a thing.",
    steps=option(10, "how many", low=1),
    rate=option(1e-3, "how fast", above=0, high=1),
    kind=option("slow", "which way", choices=("slow", "fast")),
    name=option("", "a text"),
    quiet=option(False, "print nothing"),
    levels=option((0.5,), "noise levels", above=0, high=1),
    guard=option(0.0, "a factor", above=1, off=0),
    sizes=option({}, "by name"),
    usual=option(None, "a count", kind=int),
    which=option(None, "one of two", choices=(None, "a", "b")),
    not_an_option=3,
)


def read(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding=encoding)
    return config.apply(SCRIPT, [str(path)])


def test_shipped_config_files_hold_only_known_options_of_the_right_type():
    for path in sorted((ROOT / "config").glob("[a-z]*.py")):
        config.apply(vars(train), [str(path)])


def test_defaults_stand_until_a_file_and_then_the_command_line_say_otherwise(tmp_path):
    assert vars(config.apply(SCRIPT, [])).keys() == SCRIPT.keys() - {"__doc__", "not_an_option"}
    (tmp_path / "a.py").write_text("steps, rate = 3, 0.5\n")
    options = config.apply(SCRIPT, [str(tmp_path / "a.py"), "--rate=1", "--name", "two words"])
    assert (options.steps, options.rate, options.name) == (3, 1.0, "two words")


def test_a_bare_flag_is_true_and_a_value_may_follow_it():
    assert config.apply(SCRIPT, ["--quiet"]).quiet is True
    assert config.apply(SCRIPT, ["--quiet", "False", "--steps=2"]).quiet is False
    assert config.apply(SCRIPT, ["--quiet", "false", "--steps=2"]).quiet is False
    assert config.apply(SCRIPT, ["--quiet", "--steps", "2"]).steps == 2


def test_off_is_a_value_beside_the_range():
    assert config.apply(SCRIPT, ["--guard=0"]).guard == 0
    assert config.apply(SCRIPT, ["--guard=20"]).guard == 20


def test_the_tilde_of_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").write_text("name = '~/runs'\n")
    assert config.apply(SCRIPT, [str(tmp_path / "a.py")]).name == f"{tmp_path}/runs"
    several = config.apply(SCRIPT, ["--name=~/a.safetensors,~/b.safetensors"]).name
    assert several == f"{tmp_path}/a.safetensors,{tmp_path}/b.safetensors"
    assert config.apply(SCRIPT, ["--name=a room ~ 3 m wide"]).name == "a room ~ 3 m wide"


def test_nobody_changes_options():
    options = config.apply(SCRIPT, [])
    with pytest.raises(AttributeError, match="read-only"):
        options.steps = 4
    assert options.replaced(steps=4).steps == 4 and options.steps == 10


def test_arithmetic_and_earlier_names_count_and_underscored_names_are_helpers(tmp_path):
    text = '"""What it is for."""\n_gpus = 8\nsteps = 64 // _gpus * 2\n'
    text += "rate = 2 / steps\nlevels = (0.1, rate)\n"
    options = read(tmp_path, text)
    assert (options.steps, options.rate, options.levels) == (16, 0.125, (0.1, 0.125))


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert read(tmp_path, "steps = 4\n", "utf-8-sig").steps == 4


@pytest.mark.parametrize(
    "text, words",
    [
        ("step = 3\n", "mine.py:1: unknown option 'step'; did you mean 'steps'"),
        ("\n\nsteps = 'three'\n", "mine.py:3: steps = 'three' is a text, wanted a whole number"),
        ("steps = 0\n", "mine.py:1: steps = 0, wanted at least 1"),
        ("kind = 'quick'\n", "mine.py:1: kind = 'quick', wanted slow, fast"),
        ("steps: int\n", "mine.py:1: 'steps: int' assigns nothing"),
        ("steps: 3\n", "mine.py:1: 'steps: 3' assigns nothing"),
        ("steps = 3\nrate: 0.5\n", "mine.py:2: 'rate: 0.5' assigns nothing"),
        ("", "mine.py: sets no option"),
        ("# steps = 3\n", "mine.py: sets no option"),
        ("steps = = 3\n", "mine.py:1: not a file of assignments"),
        ("import os\n", "mine.py:1: 'import os' assigns nothing"),
        ("steps = __import__('os').getpid()\n", "mine.py:1: .* is not a literal"),
        ("steps = later\n", "mine.py:1: 'later' is not a literal, a name assigned above"),
        ("steps, rate = 1, 2, 3\n", "mine.py:1: 2 names for 3 values"),
        ("options.steps = 3\n", "mine.py:1: options.steps is no name"),
        ("steps = 1 // 0\n", "mine.py:1: '1 // 0' is not a literal"),
        ("steps = 10 ** 10 ** 10\n", "mine.py:1: .* is not a literal"),
        ("rate = 1e999\n", "mine.py:1: rate = inf, wanted above 0, at most 1"),
    ],
)
def test_a_config_file_is_refused_by_file_and_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--stepps=3", "unknown option 'stepps'; did you mean 'steps'"),
        ("--steps", "--steps has no value"),
        ("--steps=3.5", "steps = 3.5 is a number, wanted a whole number"),
        ("--rate=nan", "rate = 'nan' is a text, wanted a number"),
        ("--usual=x", "usual = 'x' is a text, wanted a whole number$"),
        ("--which=c", "which = 'c', wanted None, a, b"),
        ("--rate=-1", "rate = -1.0, wanted above 0"),
        ("--levels=(0.5,2)", "levels = \\(0.5, 2\\), wanted above 0, at most 1"),
        ("--levels=('a',)", "levels = \\('a',\\), wanted above 0"),
        ("--guard=0.5", "guard = 0.5, wanted above 1, 0: off"),
        ("--sizes={[]: 2}", "sizes = '{\\[\\]: 2}' is a text, wanted a dict"),
        ("--quiet=maybe", "quiet = 'maybe' is a text, wanted True or False"),
        ("nowhere.py", "config file nowhere.py: No such file"),
    ],
)
def test_a_bad_argument_is_refused_by_name(argument, words):
    with pytest.raises(ValueError, match=words):
        config.apply(SCRIPT, [argument])


@pytest.mark.parametrize("key", ["model_overrides", "sampling"])
def test_a_key_that_is_no_name_is_an_unknown_option(key):
    with pytest.raises(ValueError, match=f"{key}: unknown option '1'"):
        train.check_options(config.apply(vars(train), [f"--{key}={{1: 2}}"]))


def test_the_frames_of_training_are_found_among_the_options_of_sampling():
    """The one nearest name alone was num_samples, which makes as many worlds."""
    with pytest.raises(ValueError, match="'num_frames'; did you mean 'num_samples' or 'frames'"):
        config.apply(vars(sample), ["--num_frames=9"])


def test_help_names_every_option_with_its_default_range_and_a_line_of_help(capsys):
    for script in (SCRIPT, vars(train), vars(sample)):
        with pytest.raises(SystemExit) as left:
            config.apply(script, ["--help"])
        text = capsys.readouterr().out
        options = {k: v for k, v in script.items() if isinstance(v, config.Option)}
        assert left.value.code == 0 and options
        for key, declared in options.items():
            assert f"--{key}={declared.default!r}" in text and declared.help in text
            assert declared.range in text


@pytest.mark.parametrize(
    "argument",
    "--grad_clip=-1 --eval_every=-1 --pose_dropout=1.5 --image_dropout=-0.1 --min_lr=-1e-6 "
    "--lambda_geo=-1 --spike_guard=-2 --shift=-5 --shift=1e300 --eval_clips=0 "
    "--camera_delta=0".split(),
)
def test_training_options_out_of_range_are_refused_where_they_are_declared(argument):
    key = argument[2:].split("=")[0]
    with pytest.raises(ValueError, match=f"{key} = .*, wanted (at least|above)"):
        config.apply(vars(train), [argument])


def test_none_may_be_typed_where_help_shows_it_as_the_default():
    assert config.apply(SCRIPT, ["--usual=3", "--usual=None", "--which", "None"]).which is None
    assert config.apply(SCRIPT, ["--usual=3", "--usual=None"]).usual is None
    assert config.apply(SCRIPT, ["--name=None"]).name == "None"
