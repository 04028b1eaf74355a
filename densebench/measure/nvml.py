"""What only the driver knows of a GPU: other processes, clocks, throttling, energy.

Without a driver everything is None, and there is a reason why.

NVML numbers devices by itself, ignoring CUDA_VISIBLE_DEVICES, so the device is found by its UUID.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What slows a GPU down against its owner's wish; idling and user-set clocks do not.
_THROTTLES = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "SwPowerCap")

ENERGY_SECONDS = 1.0  # the energy counter moves in steps of about 100 ms
READINGS = 5
DRIVER_FIELDS = (
    "energy_j",
    "sm_clock_mhz",
    "clock_event_reasons",
    "throttled",
    "process_device_bytes",
    "shared_gpu",
)


@dataclass(frozen=True)
class Reading:
    """One look at the device; what the driver does not tell is None."""

    process_bytes: int | None
    sm_clock_mhz: float | None
    event_reasons: tuple[str, ...] | None
    energy_mj: int | None
    other_processes: int | None

    @property
    def throttled(self) -> bool | None:
        if self.event_reasons is None:
            return None
        return any(reason in _THROTTLES for reason in self.event_reasons)


class Nvml:
    """The NVML handle of the CUDA device in use.

    Attributes:
        unavailable: why there is none ("no CUDA device", "driver library not found", ...), or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.unavailable: str | None = None
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            self.unavailable = "no CUDA device"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
        except Exception as error:  # any driver fault: measuring goes on without it
            self.unavailable = f"NVML: {error}"

    def read(self) -> Reading:
        """Look now; each item by itself, so that one that is not permitted hides no other."""
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        mine = [p for p in processes or [] if p.pid == os.getpid()]
        # In a container the driver's process numbers are the host's: nobody can tell which is this one.
        known = processes is not None and (len(mine) == 1 or not processes)
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        clock = self._ask("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM
        return Reading(
            process_bytes=mine[0].usedGpuMemory if mine else None,
            sm_clock_mhz=None if clock is None else float(clock),
            event_reasons=None if mask is None else self._names(mask),
            energy_mj=self._ask("nvmlDeviceGetTotalEnergyConsumption"),
            other_processes=len(processes) - len(mine) if known else None,
        )

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory and other processes, for the environment of a record."""
        if self._nvml is None:
            return {}
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return {
            "driver": self._driver(),
            "memory_bytes": None if memory is None else int(memory.total),
            "other_processes": self.read().other_processes,
        }

    def _ask(self, function: str, *arguments: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):  # not supported, not permitted, or an older library
            return None

    def _driver(self) -> str | None:
        try:
            return str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            return None

    def _names(self, mask: int) -> tuple[str, ...]:
        prefix = "nvmlClocksEventReason"
        reasons = {
            name[len(prefix) :]: value for name, value in vars(self._nvml).items() if name.startswith(prefix)
        }
        skipped = ("None", "All")
        return tuple(sorted(n for n, value in reasons.items() if n not in skipped and value and mask & value))


def facts_while_repeating(
    step: Callable[[], object], nvml: Nvml, seconds: float = ENERGY_SECONDS
) -> dict[str, Any]:
    """Fields of a record that only the driver knows, read while a step repeats; reasons where it tells nothing.

    Energy is that of one step. The clock is the median of what was read; an event that slowed any reading counts.
    """
    if nvml.unavailable is not None:
        return {"unavailable": dict.fromkeys(DRIVER_FIELDS, nvml.unavailable)}
    readings, repeats, start = [nvml.read()], 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        step()
        torch.cuda.synchronize()
        repeats += 1
        if spent > len(readings) * seconds / READINGS:
            readings.append(nvml.read())
    readings.append(nvml.read())
    facts = {**_facts_of(readings[1:]), "energy_j": None}
    first, last = readings[0].energy_mj, readings[-1].energy_mj
    if first is not None and last is not None:
        facts["energy_j"] = (last - first) / 1000 / repeats
    untold = [name for name in DRIVER_FIELDS if facts[name] is None]
    return {**facts, "unavailable": dict.fromkeys(untold, "the driver does not tell")}


def _facts_of(busy: list[Reading]) -> dict[str, Any]:
    """What some readings say together; None where none of them says anything."""
    clocks = [reading.sm_clock_mhz for reading in busy if reading.sm_clock_mhz is not None]
    reasons = [reading.event_reasons for reading in busy if reading.event_reasons is not None]
    throttled = [reading.throttled for reading in busy if reading.throttled is not None]
    others = busy[-1].other_processes
    return {
        "sm_clock_mhz": statistics.median(clocks) if clocks else None,
        "clock_event_reasons": tuple(sorted({name for names in reasons for name in names})) if reasons else None,
        "throttled": any(throttled) if throttled else None,
        "process_device_bytes": busy[-1].process_bytes,
        "shared_gpu": None if others is None else others > 0,
    }
