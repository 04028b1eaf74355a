"""`python -m densebench.report.publish RUN ...`: samples to commit and the README's figures, from runs' records.

Copies each run's records to `reports/samples/<run>/`, draws the report's first picture beside them, and writes the
README's block between its two markers. Nothing in that block is written by hand.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from densebench.report.sources import RECORDS

BEGIN = "<!-- figures: written by `python -m densebench.report.publish`; do not edit by hand -->"
END = "<!-- figures: end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m densebench.report.publish", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, with its cases.jsonl")
    parser.add_argument("--samples", type=Path, default=Path("reports/samples"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    missing = next((run / RECORDS for run in options.runs if not (run / RECORDS).is_file()), None)
    if missing is not None:
        print(f"densebench: {missing} does not exist; give the folder of a run", file=sys.stderr)
        return 3
    targets = [_copied(run, options.samples / run.name) for run in options.runs]
    block = _block(targets, options.samples)
    text = options.readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    options.readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")
    print(f"{', '.join(f'{target}/{RECORDS}' for target in targets)} and the figures of {options.readme}")
    return 0


def _copied(run: Path, target: Path) -> Path:
    """The run's place among the samples, where its records are now."""
    if target.resolve() != run.resolve():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / RECORDS, target / RECORDS)
    return target


def _block(runs: list[Path], samples: Path) -> str:
    """The README's figures: the report's answer, its picture and table, and the conditions of all of them."""
    from densebench.report.__main__ import main as write_report

    with tempfile.TemporaryDirectory() as folder:
        code = write_report([*map(str, runs), "--out", folder])
        if code:
            raise SystemExit(code)
        summary = (Path(folder) / "summary.md").read_text(encoding="utf-8")
        shutil.copyfile(Path(folder) / "figures" / "answer.svg", samples / "answer.svg")
    answer = summary.split("\n## ", 1)[0].split("\n", 1)[1]
    answer = answer.replace("(figures/answer.svg)", f"({samples.as_posix()}/answer.svg)")
    answer = re.sub("\n{3,}", "\n\n", answer).strip()
    summary = "Where and when, and every record"
    return "\n".join(
        [answer, "", f"<details><summary>{summary}</summary>", "", *map(_conditions, runs), "", "</details>"]
    )


def _conditions(run: Path) -> str:
    from densebench.report.units import device_words
    from densebench.store import read_records

    record = read_records([run / RECORDS])[0]
    facts = record.environment
    packages = facts.get("packages", {})
    words = [f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name)]
    commit = str(facts.get("commit") or "unknown")[:10]
    return (
        f"* {record.created[:10]}, {device_words(str(facts.get('device')))}, {', '.join(words)}, commit {commit}; "
        f"records: [`{run.as_posix()}/{RECORDS}`]({run.as_posix()}/{RECORDS})."
    )


if __name__ == "__main__":
    sys.exit(main())
