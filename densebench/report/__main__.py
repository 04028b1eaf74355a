"""Command line: `python -m densebench.report`; `--help` says what it does.

Nothing heavy is imported before the arguments are read.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from densebench.counting import counted
from densebench.report.sources import MAKE_SOME, InputError, files_of, load, read

FINE, REGRESSION, USAGE, NOTHING = 0, 1, 2, 3
EPILOG = f"""\
Without RUN it shows the newest run in reports/data, or the samples in reports/samples if there is none.
exit status: 0 fine, 1 regression, 2 usage, 3 no results found (make some: {MAKE_SOME})"""


class UsageError(Exception):
    """What was asked for cannot be done; one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (try --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            return _gate(options.compare[0], options.compare[1], options.fail_on)
        if options.fail_on is not None:
            raise UsageError("--fail-on needs --compare OLD NEW")
        return _report(options.runs, options.out)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m densebench.report",
        description="Make a report of benchmark records: one HTML page, Markdown, CSV, and the figures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder or file of records to show")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="where to write (default: reports)")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="compare two runs instead of writing a report",
    )
    parser.add_argument(
        "--fail-on",
        metavar="TOLERANCES",
        help="with --compare: by how much memory and time may grow (default: mem:2%%,time:10%%)",
    )
    return parser


def _report(runs: Sequence[Path], folder: Path) -> int:
    _try_writing(folder)
    try:
        loaded = load(runs)
    except InputError as error:
        raise UsageError(str(error)) from None
    if not loaded.records:
        return _nothing(" ".join(map(str, runs)) or "reports/data")
    print(f"densebench: {counted(len(loaded.records), 'record')}, drawing ...", file=sys.stderr)
    from densebench.report.console import summary_table
    from densebench.report.files import write_report
    from densebench.report.report import make_report

    report = make_report(loaded)
    try:
        written = write_report(report, folder)
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); choose another with --out") from None
    lines = summary_table([record for record in loaded.records if record.case.source == "measured"])
    if report.notice:
        lines = ["", report.notice, *lines]
    print("\n".join([*lines, "", report.answer.sentence, "", *map(str, written), f"{folder / 'figures'}/"]))
    return FINE


def _gate(old: Path, new: Path, fail_on: str | None) -> int:
    from densebench.report.gate import DEFAULT, ToleranceError, compare, parse_tolerance

    try:
        tolerance = parse_tolerance(DEFAULT if fail_on is None else fail_on)
        before, after = read(files_of(old)), read(files_of(new))
    except (InputError, ToleranceError) as error:
        raise UsageError(str(error)) from None
    for path, records in ((old, before), (new, after)):
        if not records:
            return _nothing(str(path))
    verdict = compare(before, after, tolerance)
    for note in verdict.notes:
        print(f"densebench: {note}", file=sys.stderr)
    for regression in verdict.regressions:
        print(regression.line())
    count = len(verdict.regressions)
    words = counted(count, "regression") if count else "no regression"
    print(f"{counted(verdict.compared, 'case')} compared: {words} ({fail_on or DEFAULT})")
    return REGRESSION if count else FINE


def _nothing(where: str) -> int:
    print(f"densebench: no results found in {where}; make some: {MAKE_SOME}", file=sys.stderr)
    return NOTHING


def _try_writing(folder: Path) -> None:
    """Find out now, and not after all the work, whether the folder can be written.

    Raises:
        UsageError: if it cannot.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); choose another with --out") from None


if __name__ == "__main__":
    sys.exit(main())
