"""Config files are Python assignments; `apply` runs one over a script's globals, then --key=value options.
A key that the script does not define, or a value of another type, is an error that names it and the nearest key."""

import ast
import difflib

SIMPLE = (int, float, str, bool, tuple, dict)


def check(key, value, known, where):
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        raise SystemExit(
            f"{where}: unknown option '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
        )
    want = type(known[key])
    value = float(value) if want is float and type(value) is int else value
    if type(value) is not want:
        raise SystemExit(
            f"{where}: {key} = {value!r} is a {type(value).__name__}; wanted a {want.__name__} "
            f"such as {known[key]!r}"
        )
    return value


def apply(script, argv):
    """script = globals() of the caller, argv = [CONFIG.py] [--key=value ...]; sets and returns the public options."""
    known = {k: v for k, v in script.items() if k.islower() and k[0] != "_" and type(v) in SIMPLE}
    for arg in argv:
        found, where = {}, arg
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            where = "command line"
            try:
                found[key] = text if type(known.get(key)) is str else ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[key] = text if equals else "(nothing: options are written --key=value)"
        else:
            try:
                exec(compile(open(arg).read(), arg, "exec"), found)
            except OSError as error:
                raise SystemExit(
                    f"config file {arg}: {error.strerror}; config/ lists those that exist"
                ) from None
        for key, value in found.items():
            if not key.startswith("__") and (
                type(value) in (*SIMPLE, list, set, type(None)) or key in known
            ):
                known[key] = check(key, value, known, where)
    script.update(known)
    return known
