"""One case in a process of its own, so that nothing it leaves behind or breaks reaches another.

The child is started afresh (never forked), in a process group that is killed whole when its time is up. It
gets the case on its standard input and leaves records in a store of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from densebench.measure.environment import environment
from densebench.measure.timing import Effort
from densebench.results import Case, Record, RunStore, Status

TIMEOUT_SECONDS = 420.0  # 300 to compile, 120 to run


def run_isolated(case: Case, effort: Effort, group: str | None, timeout: float = TIMEOUT_SECONDS) -> Record:
    """Measure one case in a fresh process; always a record, also of a crash or a hang."""
    with tempfile.TemporaryDirectory(prefix="densebench-") as folder:
        job = {"case": dataclasses.asdict(case), "effort": dataclasses.asdict(effort), "group": group}
        child = subprocess.Popen(
            [sys.executable, "-m", "densebench.measure.worker", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = child.communicate(json.dumps(job), timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return _failed(case, "timeout", f"took more than {timeout:.0f} s")
        records = RunStore(Path(folder)).read()
    complete = [record for record in records if record.status != "ok" or group is None or record.time_s]
    if complete:
        return complete[-1]
    if child.returncode < 0:
        return _failed(case, "crash", f"killed by {signal.Signals(-child.returncode).name}")
    last = errors.strip().splitlines()[-1:] or ["no message"]
    return _failed(case, "error", f"the process ended with {child.returncode}: {last[0][:300]}")


def _failed(case: Case, status: Status, reason: str) -> Record:
    # Asking the GPU for its facts would make a CUDA context in the parent.
    facts = environment("cpu") if case.device == "cpu" else {}
    return Record(case, status, reason, environment=facts)


def main() -> None:
    from densebench.measure.runner import Runner

    job = json.load(sys.stdin)
    case = Case(**{**job["case"], "input_shape": tuple(job["case"]["input_shape"])})
    runner = Runner(RunStore(Path(sys.argv[1])), Effort(**job["effort"]))
    runner.measure([case], job["group"])


if __name__ == "__main__":
    main()
