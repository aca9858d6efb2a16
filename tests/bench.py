#!/usr/bin/env python3
"""LinK's benchmark: each row of scenarios.py, many times and with LinK's defaults, judged against its bars.

Real kernels' addresses and ARP, real ZooKeeper, real processes and signals; lab.py's Probes says what "away" means.
A run whose precondition fails is told and makes its row MISSED; it is never dropped. Progress goes to stderr, the table
to stdout; exit code 0: every bar held, 1: not. It measures milliseconds: run it alone. LINK_LOG_LEVEL=DEBUG goes to the
agents as any LINK_ variable does.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peers
from lab import Lab
from scenarios import ROWS, Cluster, Measured, Row


@dataclass
class Record:
    """What became of a row: what each run measured, and what went wrong in the others."""

    row: Row
    family: str
    runs: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The row's, and the family's where there are two."""
        return self.row.name + (f", IPv{self.family}" if len(self.row.families) > 1 else "")

    def misses(self) -> list[str]:
        """The figures whose bar is not held."""
        return [f.name for f in self.row.figures if not f.held([run[f.name] for run in self.runs])] if self.runs else []

    def cells(self) -> list[str]:
        """The row of the table."""
        runs = f"{len(self.runs)}" + (f" + {len(self.failed)} FAILED" if self.failed else "")
        verdict = "ok" if self.runs and not self.failed and not self.misses() else "MISSED"
        return [self.name, self.row.bar, self.show(statistics.median), self.show(max), runs, verdict]

    def show(self, pick: Callable[[list[float]], float]) -> str:
        """The figures of all runs in one."""
        return ", ".join(f.show(pick([run[f.name] for run in self.runs])) for f in self.row.figures if self.runs)


class Bench:
    """A cluster that goes from row to row, and is made anew after a run that failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self._stack = options, contextlib.ExitStack()
        self._cluster: Cluster | None = None

    def close(self) -> None:
        """Remove it."""
        self._cluster = None
        self._stack.close()

    def measure(self, row: Row, family: str) -> Record:
        """All runs of one row."""
        record, times = Record(row, family), max(1, round(row.times * self.options.runs / 20))
        for number in range(1, times + 1):
            print(f"{record.name} {number}/{times}: ", end="", file=sys.stderr, flush=True)
            one, shorter = Record(row, family), 6 if self.options.quick else 1
            cluster = self._cluster or Cluster(self._stack.enter_context(Lab()), False, shorter)
            self._cluster = cluster
            try:
                cluster.prepare(row, family)
                one.runs.append(row.procedure(cluster))
            except (AssertionError, RuntimeError, OSError, subprocess.SubprocessError, LookupError) as error:
                one.failed.append(f"FAILED: {type(error).__name__}: {error}")
            bad = ", ".join(one.failed + one.misses())
            print(one.show(max), bad and f" <- {bad}", file=sys.stderr, flush=True)
            if bad and self.options.logs:
                directory = self.options.logs / re.sub(r"\W+", "-", f"{record.name}-{number}")
                directory.mkdir(parents=True, exist_ok=True)
                for host in cluster.hosts:
                    (directory / f"{host.name}.log").write_text(host.log())
            record.runs += one.runs
            record.failed += one.failed
            if one.failed:
                self.close()
        return record


def table(records: Sequence[Record], aligned: bool) -> str:
    """The markdown table."""
    rows = [["scenario", "bar", "median", "worst", "runs", ""], *(record.cells() for record in records)]
    widths = [max(len(line[n]) for line in rows) if aligned else 0 for n in range(len(rows[0]))]
    rows.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in rows)


@contextlib.contextmanager
def room_for_neighbours() -> Iterator[None]:
    """Let the kernel know thousands of neighbours; the limits of all namespaces are those in the first one's /proc."""
    files = [Path(f"/proc/sys/net/ipv4/neigh/default/gc_thresh{n}") for n in (3, 2, 1)]
    before = {file: file.read_text() for file in files if file.exists()}
    try:
        for file, value in before.items():
            file.write_text(str(max(int(value), 20000)))
        yield
    finally:
        for file, value in before.items():
            file.write_text(value)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure LinK against the bars of scenarios.py.")
    option = parser.add_argument
    option("--runs", type=int, metavar="N", help="runs per row (20; with --peers 4); some take a part or a multiple")
    option("--peers", action="store_true", help="beside keepalived and ucarp, and write the table into the README")
    option("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows by name, for example 'host death*'")
    option("--list", action="store_true", help="print the rows and their bars")
    option("--quick", action="store_true", help="a sixth of the time where a row waits long")
    option("--json", type=Path, metavar="FILE", help="write every figure of every run")
    option("--markdown", action="store_true", help="do not align the columns of the table")
    option("--logs", type=Path, metavar="DIRECTORY", help="keep the agents' logs of runs that went wrong")
    options = parser.parse_args()
    if options.peers:
        with room_for_neighbours():
            return peers.main(options.runs or 4, options.only)
    options.runs = options.runs or 20
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in options.only)]
    if options.list or not rows:
        print("\n".join(f"{row.name}\n    {row.bar}" for row in rows or ROWS))
        return 0 if rows else 2
    todo = [(row, family) for row in rows for family in row.families]
    records: list[Record] = []
    with room_for_neighbours(), contextlib.closing(Bench(options)) as bench, contextlib.suppress(KeyboardInterrupt):
        for row, family in todo:
            records.append(bench.measure(row, family))
            if options.json:
                report = {record.name: {"runs": record.runs, "failed": record.failed} for record in records}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(records, not options.markdown))
    return 0 if len(records) == len(todo) and all(record.cells()[-1] == "ok" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
