"""What only the driver knows of a GPU: other processes, clocks, throttling, energy.

Without a driver everything is None, and there is a reason why.

NVML numbers devices by itself, ignoring CUDA_VISIBLE_DEVICES, so the device is found by its UUID.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

# What slows a GPU down against its owner's wish; idling and user-set clocks do not.
_THROTTLES = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown", "SwPowerCap")


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
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        clock = self._ask("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM
        return Reading(
            process_bytes=mine[0].usedGpuMemory if mine else None,
            sm_clock_mhz=None if clock is None else float(clock),
            event_reasons=None if mask is None else self._names(mask),
            energy_mj=self._ask("nvmlDeviceGetTotalEnergyConsumption"),
            other_processes=None if processes is None else len(processes) - len(mine),
        )

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory and other processes, for the environment of a record."""
        if self._nvml is None:
            return {}
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return {
            "driver": self._nvml.nvmlSystemGetDriverVersion(),
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

    def _names(self, mask: int) -> tuple[str, ...]:
        prefix = "nvmlClocksEventReason"
        reasons = {
            name[len(prefix) :]: value for name, value in vars(self._nvml).items() if name.startswith(prefix)
        }
        skipped = ("None", "All")
        return tuple(sorted(n for n, value in reasons.items() if n not in skipped and value and mask & value))
