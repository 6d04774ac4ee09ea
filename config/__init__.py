"""Options: declared as a script's globals, set by config files of assignments and by --key=value.

    batch_size = option(8, "clips per GPU and micro-step", low=1)       in a script
    options = config.apply(globals(), ["config/stage1.py", "--batch_size=4"])

A config file is Python to the eye, and is parsed, not run: assignments of numbers, texts, tuples
and dicts, arithmetic, and names that the file has assigned before (those that begin with _ are
helpers). Whatever is misspelt, of another type or out of range is a ValueError that names the file
and line."""

import ast
import difflib
import math
import operator
from dataclasses import dataclass
from types import SimpleNamespace

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
WORDS |= {tuple: "a tuple", dict: "a dict"}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Option:
    """One option; its type is that of the default, or kind where that is None (else a text)."""

    default: object
    help: str
    low: float | None = None  # smallest allowed value
    high: float | None = None  # largest allowed value
    above: float | None = None  # every value must be larger
    choices: tuple = ()
    kind: type | None = None  # of an option that is None unless it is set

    def type(self):
        return self.kind or (str if self.default is None else type(self.default))

    def range(self):
        """The allowed values in words, "" for any."""
        if self.choices:
            return ", ".join(str(choice) for choice in self.choices)
        words = [f"above {self.above:g}"] if self.above is not None else []
        words += [f"at least {self.low:g}"] if self.low is not None else []
        words += [f"at most {self.high:g}"] if self.high is not None else []
        return ", ".join(words)


def option(default, help, **limits):  # noqa: A002  (the word that argparse uses too)
    """Declare an option: default, one line of help, and low=, high=, above= or choices=."""
    return Option(default, help, **limits)


@dataclass(frozen=True)
class Section:
    """A headline between options, for --help."""

    title: str


def section(title):
    return Section(title)


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
            print(help_text(script, known))
            raise SystemExit(0)
        if not arg.startswith("--"):
            values.update(read_config(arg, known))
            continue
        key, equals, text = arg[2:].partition("=")
        declared = look_up(key, known, "command line")
        if not equals and declared.type() is bool:
            said = rest[0] if rest and rest[0].lower() in ("true", "false") else None
            text = rest.pop(0) if said else "True"
        elif not equals:
            if not rest:
                raise ValueError(f"command line: --{key} has no value; write --{key}=VALUE")
            text = rest.pop(0)
        values[key] = check(key, from_text(text, declared), declared, "command line")
    return Options(**values)


def look_up(key, known, where):
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else "; --help lists all"
        raise ValueError(f"{where}: unknown option '{key}'{hint}")
    return known[key]


def from_text(text, declared):
    """What was typed for an option as a value of its type where it can be one."""
    if declared.type() is str:
        return text
    if declared.type() is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(key, value, declared, where):
    """The value in its option's type and range, or a ValueError."""
    wanted = declared.type()
    if wanted is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if wanted is tuple and type(value) in (list, int, float):
        value = tuple(value) if type(value) is list else (value,)
    if type(value) is not wanted:
        raise ValueError(
            f"{where}: {key} = {value!r} is {WORDS.get(type(value), type(value).__name__)}, "
            f"wanted {WORDS[wanted]} such as {declared.default!r}"
        )
    good = True
    if declared.choices:
        good = value in declared.choices
    elif wanted in (int, float):
        good = math.isfinite(value)
        good &= declared.above is None or value > declared.above
        good &= declared.low is None or value >= declared.low
        good &= declared.high is None or value <= declared.high
    if not good:
        raise ValueError(f"{where}: {key} = {value!r}, wanted {declared.range() or 'a number'}")
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
    values, helpers = {}, {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        if not isinstance(statement, ast.Assign):
            line = ast.unparse(statement).splitlines()[0][:60]
            raise ValueError(f"{where}: '{line}' assigns nothing; wanted lines like stage = 1")
        value = evaluate(statement.value, {**helpers, **values}, where)
        for key, each in targets(statement.targets, value, where):
            if key.startswith("_"):
                helpers[key] = each
            else:
                values[key] = check(key, each, look_up(key, known, where), where)
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
        text = ast.unparse(node)[:60]
        raise ValueError(
            f"{where}: '{text}' is not a literal, a name assigned above, or arithmetic on them"
        ) from None


def help_text(script, known):
    """Every option with its default, range and help, after the first line of the script's text."""
    lines = [(script.get("__doc__") or "").strip().split("\n")[0]]
    for key, declared in script.items():
        if isinstance(declared, Section):
            lines += ["", f"{declared.title}:"]
        if key not in known:
            continue
        limits = f"  ({declared.range()})" if declared.range() else ""
        lines += [f"  --{key}={declared.default!r}{limits}", f"        {declared.help}"]
    return "\n".join(lines)
