"""One case in a process of its own, so that nothing it leaves behind or breaks reaches another.

The child is started afresh (never forked), in a process group that is killed whole when its time is up. It
gets the case on its standard input and leaves records in a store of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from densebench.contenders import get_contender
from densebench.measure.deadline import TIMEOUT_SECONDS
from densebench.measure.device import DeviceLostError, tune
from densebench.measure.environment import environment
from densebench.measure.timing import Effort
from densebench.records import Case, Record, Status
from densebench.store import RunStore

STACK_SECONDS = 5.0  # for a hanging child to say where it hangs


def run_isolated(case: Case, effort: Effort, group: str | None, timeout: float = TIMEOUT_SECONDS) -> Record:
    """Measure one case in a fresh process; always a record, also of a crash or a hang.

    Args:
        group: as in `Runner.measure`; None measures memory only.
    """
    with tempfile.TemporaryDirectory(prefix="densebench-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-m", "densebench.measure.worker", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        hung = False
        try:
            _, errors = child.communicate(_job(case, effort, group), timeout)
        except subprocess.TimeoutExpired:
            hung, errors = True, _ask_where(child)
        finally:  # also when the parent is interrupted
            _kill_group(child)
        found = RunStore(Path(folder)).read()
    if hung:
        return _broken(case, found, "timeout", f"took more than {timeout:g} s{_where(errors)}")
    complete = [record for record in found if record.status != "ok" or group is None or record.time_s]
    if complete and child.returncode == 0:
        return complete[-1]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return _broken(case, found, "crash", f"killed by {name}{_where(errors)}")
    last = errors.strip().splitlines()[-1:] or ["no message"]
    return _broken(case, found, "error", f"the process ended with {child.returncode}: {last[0][:300]}")


def _job(case: Case, effort: Effort, group: str | None) -> str:
    """What the child must know; a contender registered by a module of the user's is found again."""
    job = {"case": asdict(case), "effort": asdict(effort), "group": group, "path": sys.path}
    return json.dumps({**job, "module": get_contender(case.strategy).module})


def _ask_where(child: subprocess.Popen[str]) -> str:
    """End a child that hangs, letting it write where it was; what it wrote to its standard error."""
    child.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
    try:
        return child.communicate(timeout=STACK_SECONDS)[1]
    except subprocess.TimeoutExpired:
        _kill_group(child)
        return child.communicate()[1]


def _kill_group(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _where(errors: str) -> str:
    """The innermost frame of the first stack in a faulthandler's report, or nothing."""
    frames = [line.strip() for line in errors.splitlines() if line.startswith("  File ")]
    return f", at {frames[0]}" if frames else ""


def _broken(case: Case, found: list[Record], status: Status, reason: str) -> Record:
    """The record of a child that did not end well, with whatever it had found until then."""
    if found:
        return dataclasses.replace(found[-1], status=status, reason=reason)
    # Asking the GPU for its facts would make a CUDA context in the parent.
    facts = environment("cpu") if case.device == "cpu" else {}
    return Record(case, status, reason, environment=facts)


def main() -> None:
    from densebench.measure.runner import Runner

    faulthandler.enable()
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    importlib.import_module(job["module"])
    tune(job["case"]["device"])
    case = Case(**{**job["case"], "input_shape": tuple(job["case"]["input_shape"])})
    runner = Runner(RunStore(Path(sys.argv[1])), Effort(**job["effort"]))
    with contextlib.suppress(DeviceLostError):  # its record says so
        runner.measure([case], job["group"])


if __name__ == "__main__":
    main()
