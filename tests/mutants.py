"""Plants bugs of the kind that people really write into copies of link.py, one at a time, and sees who finds them.

python mutants.py             all of them: who found each, and after how many seconds
python mutants.py WORD...     those whose names have one of these words

The suites (the simulation in two halves) run at the same time, each to its first failure; the first one counts. A bug
that survives is a hole in them. A change that does not apply exactly once is an error: its line in link.py has changed,
follow it.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# What starts this, takes a minute, counts lines, or fails on a busy machine, whatever link.py does.
BUT = "not (mutant or fresh or short or connections or in_seconds)"
SUITES = (
    ("test_link.py", BUT),
    ("tests/test_sim.py", f"scene and {BUT}"),
    ("tests/test_sim.py", f"not scene and {BUT}"),
)
PATIENCE = 600.0  # seconds for all

MUTANTS = {  # name -> a line's part, and what stands there instead
    "skips the witness": ("silent = f.proven and (f.deaf == 0 or isolated)", "silent = f.proven"),
    "accuses without having heard": ("accuse=silent and f.met and f.next", "accuse=silent and f.next"),
    "unbinds before the successor is heard": ("f.taken) and f.other and after", "f.taken) and after"),
    "trusts a stale election": ("if known and min(self._confirmed, place.listed) >= since", "if True"),
    "forgets the watch after a reconnect": ("place.heeded = False, True,", "place.heeded = False, place.stale,"),
    "announces nothing after binding": ("/ 3) * (self.step < 0)", "/ 3) + REFRESH"),
    "ignores a rival's claim": ("beaten = rivalled and f.staying >= patience(f)", "beaten = False"),
    "renews the lease from a follower's word": (
        'not refused and call not in ("get", "exists", "get_children")',
        "not refused",
    ),
    "loses an order at a reload": ("or math.inf in [*self._clients.values()]) and now < deadline", ") and False"),
    "a timer never cancelled": ("ear.look, self._moved[ear] = Look.NONE, None", "ear.look = ear.look"),
    "takes what somebody answers for": ("orphan and (silent or f.blind)", "orphan"),
    "both believe in the lower MAC": ("lower=link.mac < mac", "lower=True"),
    "leaves a second node after a lost answer": ("out = mine[1:] if stands else mine", "out = [] if stands else mine"),
    "forgets its session at a restart": ("if session and not self.stopping else None", "if False else None"),
    "breaks a lock without looking at its own": ("*(CheckVersion(node, -1) for node in ours), ", ""),
    "holds on after its lease has run out": ("late = strict and not a.in_time(a.clock.now())", "late = False"),
}


class Found(NamedTuple):
    by: str  # a test's name; "": it has survived
    seconds: float
    processor: float  # seconds of all together: on two idle ones about twice the seconds


def plant(name: str, text: str) -> str:
    """link.py with this bug. Raises ValueError where the change does not apply exactly once."""
    old, new = MUTANTS[name]
    if text.count(old) != 1:
        raise ValueError(f"{name!r}: {old!r} is {text.count(old)} times in link.py, not once")
    return text.replace(old, new)


def find(name: str) -> Found:
    """Run the suites on a copy with this bug."""
    began, skipped = _clocks(), shutil.ignore_patterns(".*", "__pycache__", "docs")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "link"
        shutil.copytree(ROOT, copy, ignore=skipped)
        (copy / ".git").symlink_to(ROOT / ".git")  # some schedules run an earlier version beside this one
        (copy / "link.py").write_text(plant(name, (ROOT / "link.py").read_text(encoding="utf-8")), encoding="utf-8")
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
        commands = [[*pytest, suite, "-k", words] for suite, words in SUITES]
        runs = [subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True) for command in commands]
        try:
            while time.monotonic() < began[0] + PATIENCE and not (failed := [run for run in runs if run.poll()]):
                if all(run.poll() == 0 for run in runs):
                    break
                time.sleep(0.05)
        finally:
            for run in runs:
                run.kill()
        said = [run.communicate()[0] for run in failed]
    lines = [line for text in said for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    assert bool(lines) is bool(failed), said
    took = [now - then for now, then in zip(_clocks(), began, strict=True)]
    return Found(lines[0].split(" ", 1)[1].split(" - ")[0] if lines else "", *took)


def _clocks() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), used.ru_utime + used.ru_stime


def main(words: Sequence[str]) -> int:
    names = [name for name in MUTANTS if not words or any(word in name for word in words)]
    found = {}
    for name in names:
        found[name] = find(name)
        by, seconds, processor = found[name]
        print(f"{name:41} {seconds:5.1f} s ({processor:4.1f} s of a processor)  {by or 'SURVIVED'}", flush=True)
    return sum(not each.by for each in found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
