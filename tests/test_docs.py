"""The documents: links lead somewhere, and files, options and configs that they name exist."""

import argparse
import pathlib
import re

import pytest

import config
import data
import sample
import train

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page):
    """What #... may name in a page, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page):
    """Commands of a page's blocks and of code within its lines, each as a list of words."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^.*\.py .*", text, re.M)
    inline = re.findall(r"`([^`\n]*(?:\n[^`\n]+)?)`", text)  # a span may go over a line's end
    whole = [line for line in lines if "`" not in line]
    return [command.split("#")[0].split() for command in (*whole, *inline)]


def known_options():
    """{(script, command of data.py or ""): the options that it takes}."""
    found = {}
    for script in (train, sample):
        names = {k for k, v in vars(script).items() if isinstance(v, config.Option)}
        found[script.__name__ + ".py", ""] = {f"--{name}" for name in names} | {"--help", "--check"}
    found["app.py", ""] = found["sample.py", ""]
    parsers = [a for a in data.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, parser in parsers[0].choices.items():
        found["data.py", name] = set(parser._option_string_actions)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_page_has_options_and_a_config_that_exist(name):
    known, count = known_options(), 0
    for words in commands(ROOT / name):
        scripts = [word for word in words if word in ("train.py", "sample.py", "app.py", "data.py")]
        if not scripts or not {"python", "torchrun"} & set(words):
            continue
        rest = words[words.index(scripts[0]) + 1 :]
        told = (scripts[0], rest[0] if scripts[0] == "data.py" and rest else "")
        given = {
            word.split("=")[0].strip("[]") for word in rest if word.strip("[").startswith("--")
        }
        assert told in known and given <= known[told], (words, given - known.get(told, set()))
        configs = [word for word in rest if re.fullmatch(r"config/\w+\.py", word)]
        assert all((ROOT / path).is_file() for path in configs), words
        count += 1
    assert count or name != "README.md", "no command was found: is the search still right?"


def test_the_readme_names_every_file_of_the_program():
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("*.py"), *ROOT.glob("lib/[!_]*.py")]
    assert not [p.name for p in files if f"`{p.stem}`" not in said and f"`{p.name}`" not in said]


@pytest.mark.parametrize(
    ("package", "first"),
    [
        ("imageio-ffmpeg", (0, 6)),  # 0.5.1 has ffmpeg 4.2.2, which does not know -fps_mode
        ("tokenizers", (0, 19)),  # 0.15.2 cannot read a Metaspace that says "split"
        ("tensorboard", (2, 20)),  # 2.19 brings no pillow, which its pictures need
    ],
)
def test_the_lower_bounds_are_versions_that_work(package, first):
    """Tried on Python 3.10, all packages at their bounds; what is older fails as said above."""
    bounds = dict(line.split(">=") for line in (ROOT / "requirements.txt").read_text().split())
    assert tuple(map(int, bounds[package].split("."))) >= first


def parsers(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def test_every_argument_of_data_py_has_a_line_of_help_with_its_default():
    for parser in parsers(data.make_parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, (parser.prog, action.dest)
            told = action.default in (None, "", argparse.SUPPRESS, -1) or action.const
            word = {"auto": "GPU", data.MINIATURE: "tiny/wan"}.get(action.default, action.default)
            assert told or re.search(rf"default {word}\b", action.help), (parser.prog, action.dest)
