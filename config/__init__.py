"""Options: declared as a script's globals, set by config files of assignments and by --key=value.

    batch_size = option(8, "clips per GPU and micro-step", low=1)       in a script
    options = config.apply(globals(), ["config/stage1.py", "--batch_size=4"])

A config file is Python to the eye, and is parsed, not run: assignments of numbers, texts, tuples
and dicts, arithmetic, and names that the file has assigned before (those that begin with _ are
helpers). What is misspelt, of another type or out of range is a ValueError with file and line."""

import ast
import difflib
import operator
import os
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from types import SimpleNamespace

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
WORDS |= {tuple: "a tuple", dict: "a dict"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ARITHMETIC |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True)
class Option:
    """One option.  Its type is the default's, or kind where that is None (else a text)."""

    default: object
    help: str
    low: float = -inf  # smallest allowed number, or length of a text
    high: float = inf  # largest allowed number
    above: float = -inf  # every number must be larger
    off: object = None  # beside the range: the value that turns it off
    choices: tuple = ()
    kind: type | None = None

    @property
    def type(self):
        return self.kind or (str if self.default is None else type(self.default))

    @property
    def range(self):
        """The allowed values in words, "" for any."""
        words = [f"above {self.above:g}"] if self.above > -inf else []
        words += [f"at least {self.low:g}" + " letter" * (self.type is str)] * (self.low > -inf)
        words += [f"at most {self.high:g}"] if self.high < inf else []
        words += [f"{self.off!r}: off"] if self.off is not None else []
        return ", ".join(map(str, self.choices or words))

    def allows(self, value):
        """Whether a value of its type lies in its range; of a tuple, every number in it."""
        if self.choices or value == self.off:
            return value == self.off or value in self.choices
        if self.type in (str, bool, dict):
            return self.type is not str or len(value) >= self.low
        return all(map(self.holds, value if self.type is tuple else (value,)))

    def holds(self, n):
        return type(n) in (int, float) and self.low <= n <= self.high and self.above < n < inf


class Section(str):
    """A headline between options, for --help."""


option, section = Option, Section  # as scripts declare them


class Options(SimpleNamespace):
    """The values of all options, read by attribute; nobody changes them."""

    def __setattr__(self, key, value):
        raise AttributeError(f"options are read-only; replaced({key}=...) makes a copy")

    def replaced(self, **changes):
        return Options(**{**vars(self), **changes})


def apply(script, argv):
    """Options of a script (its globals()) after argv: config files, --key=value, --key value.

    A bare --key stands for True; --help prints all of them and leaves.  Raises ValueError."""
    known = {key: value for key, value in script.items() if isinstance(value, Option)}
    values = {key: declared.default for key, declared in known.items()}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg in ("--help", "-h"):
            print(help_text(script))
            raise SystemExit(0)
        if not arg.startswith("--"):
            values.update(read_config(arg, known))
            continue
        key, equals, text = arg[2:].partition("=")
        declared, after = look_up(key, known, "command line"), "".join(rest[:1]).title()
        if not equals and declared.type is bool and after not in ("True", "False"):
            text = "True"
        elif not equals:
            if not rest:
                raise ValueError(f"command line: --{key} has no value. Fix: write --{key}=VALUE")
            text = rest.pop(0)
        values[key] = None  # as --help writes such a default
        if text != "None" or declared.default is not None:
            values[key] = check(key, from_text(text, declared.type), declared, "command line")
    return Options(**values)


def look_up(key, known, where):
    """known[key], or a ValueError with the name that is nearest."""
    if key not in known:
        near = " or ".join(map(repr, difflib.get_close_matches(str(key), known, 2)))
        hint = f"; did you mean {near}?" if near else "; --help lists all"
        raise ValueError(f"{where}: unknown option '{key}'{hint}")
    return known[key]


def from_text(text, wanted):
    """What was typed as a value of the wanted type where it can be one, else the text."""
    if wanted is not str:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ast.literal_eval(text.title() if wanted is bool else text)
    return text


def check(key, value, declared, where):
    """The value in its option's type and range, or a ValueError; ~ becomes the home folder."""
    wanted = declared.type
    if wanted is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if wanted is tuple and type(value) in (list, int, float):
        value = tuple(value) if type(value) is list else (value,)
    if type(value) is not wanted:
        found = WORDS.get(type(value), type(value).__name__)
        such = f" such as {declared.default!r}" if declared.default is not None else ""
        raise ValueError(f"{where}: {key} = {value!r} is {found}, wanted {WORDS[wanted]}{such}")
    if not declared.allows(value):
        raise ValueError(f"{where}: {key} = {value!r}, wanted {declared.range or 'numbers'}")
    if wanted is str and "~" in value:  # a path, or several with commas
        value = ",".join(map(os.path.expanduser, value.split(",")))
    return value


# --- Config files ------------------------------------------------------------------------------
def read_config(path, known):
    """name -> value of a config file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            tree = ast.parse(file.read(2**20))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"config file {path}: {reason}; config/ lists those that exist") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}:{line}: not a file of assignments ({error})") from None
    names = {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if not isinstance(statement, ast.Assign):
            line = ast.unparse(statement).splitlines()[0][:60]
            raise ValueError(f"{where}: '{line}' assigns nothing; wanted lines like stage = 1")
        value = evaluate(statement.value, names, where)
        for key, each in targets(statement.targets, value, where):
            helper = key.startswith("_")
            names[key] = each if helper else check(key, each, look_up(key, known, where), where)
    values = {key: value for key, value in names.items() if not key.startswith("_")}
    if not values:
        raise ValueError(f"{path}: sets no option; wanted lines like stage = 1")
    return values


def targets(nodes, value, where):
    """(name, value) of the left side of an assignment."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id, value
        elif isinstance(node, ast.Tuple) and isinstance(value, tuple):
            if len(node.elts) != len(value):
                raise ValueError(f"{where}: {len(node.elts)} names for {len(value)} values")
            for name, each in zip(node.elts, value):
                yield from targets([name], each, where)
        else:
            raise ValueError(f"{where}: {ast.unparse(node)} is no name; wanted key = value")


def evaluate(node, names, where):
    """The value of an expression: literals, names that were assigned, arithmetic on numbers."""
    try:
        if isinstance(node, ast.Name):
            return names[node.id]
        if isinstance(node, ast.Tuple):
            return tuple(evaluate(item, names, where) for item in node.elts)
        if isinstance(node, ast.BinOp):
            sides = [evaluate(side, names, where) for side in (node.left, node.right)]
            if all(type(side) in (int, float) for side in sides):
                return ARITHMETIC[type(node.op)](*sides)
        return ast.literal_eval(node)
    except (KeyError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        wanted = "not a literal, a name assigned above, or arithmetic on them"
        raise ValueError(f"{where}: '{ast.unparse(node)[:60]}' is {wanted}") from None


def help_text(script):
    """Every option with its default, range and help, after the first line of the script's text."""
    lines = [(script.get("__doc__") or "").strip().split("\n")[0]]
    for key, declared in script.items():
        if isinstance(declared, Section):
            lines += ["", f"{declared}:"]
        elif isinstance(declared, Option):
            limits = f"  ({declared.range})" if declared.range else ""
            lines += [f"  --{key}={declared.default!r}{limits}", f"        {declared.help}"]
    return "\n".join(lines)
