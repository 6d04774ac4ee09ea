"""What the doctor found of a sample, and how it is printed."""

from lib.suspects import HINTS

STATES = ["ok", "skip", "warn", "fail"]


class Report:
    """Checks of one sample: ok, warn (worth a look), skip (cannot be checked) or fail, and why."""

    def __init__(self, name):
        self.id, self.checks, self.numbers, self.suspects = name, {}, {}, []
        self.worst = None  # (t, s): frames that disagree most

    def add(self, check, status, text):
        before, said = self.checks.get(check, ("ok", ""))
        worst = max(before, status, key=STATES.index)
        self.checks[check] = (worst, "; ".join(filter(None, (said, text))))
        return self

    def suspect(self, check, name, text, status="fail"):
        self.suspects.append(name)
        self.add(check, status, f"{name}: {text}")

    def as_dict(self):
        checks = {k: dict(status=s, text=t) for k, (s, t) in self.checks.items()}
        hints = [HINTS[s] for s in self.suspects]
        told = dict(id=self.id, status=self.status, suspects=self.suspects, hints=hints)
        return dict(told, **self.numbers, checks=checks)

    @property
    def status(self):
        return max((s for s, _ in self.checks.values()), key=STATES.index, default="ok")


# name of a number: width, format
COLUMNS = dict(
    frames=(6, "d"),
    depth_low=(8, ".3g"),
    depth_high=(8, ".3g"),
    valid=(6, ".0%"),
    shared=(7, ".0%"),
    relative=(9, ".1e"),
    photo=(6, ".2f"),
)


def print_report(report, fix_hints, header):
    if header:
        names = ((k.replace("depth_", ""), width) for k, (width, _) in COLUMNS.items())
        titles = "".join(f" {name:>{width}s}" for name, width in names)
        print(f"{'sample':24s}{titles}  verdict")
    cells = []
    for key, (width, form) in COLUMNS.items():
        value = report.numbers.get(key)
        cells.append("-".rjust(width) if value is None else format(value, f"{width}{form}"))
    verdict = ", ".join([report.status, *report.suspects])
    print(f"{report.id[:24]:24s} {' '.join(cells)}  {verdict}", flush=True)
    for check, (status, text) in report.checks.items():
        if status != "ok":
            print(f"    {status} {check}: {text}")
    for name in dict.fromkeys(report.suspects) if fix_hints else ():
        print(f"    cure of {name}: {HINTS[name]}")
