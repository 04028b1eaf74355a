"""Synthetic records for the tests of the report: invented figures in the shape of real runs.

Nothing here was measured. The devices are named so that a page made of them cannot be mistaken for a result.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from densebench.records import Case, Record, Timeline, Timing
from densebench.training.records import EpochRecord

GIB = 2**30
MIB = 2**20
GPU_BYTES = 24 * GIB
STRATEGIES = ("naive", "checkpointed", "shared_buffer", "fused", "fused_recompute")
PEERS = ("torchvision", "torchvision_checkpointed", "timm", "monai", "compiled", "offloaded")
DEPTHS = (48, 68, 96, 136, 192)

# Invented: activation MiB an image, and milliseconds a step as (fixed, per image).
_CONTENDERS: dict[str, tuple[float, float, float]] = {
    "naive": (128.0, 14.0, 1.45),
    "checkpointed": (61.0, 19.0, 1.85),
    "shared_buffer": (42.0, 20.0, 1.70),
    "fused": (31.0, 11.0, 0.98),
    "fused_recompute": (19.0, 12.0, 1.12),
    "torchvision": (128.0, 13.5, 1.44),
    "torchvision_checkpointed": (61.0, 18.0, 1.80),
    "timm": (128.0, 14.2, 1.46),
    "monai": (128.0, 14.4, 1.47),
    "compiled": (74.0, 10.5, 1.21),
    "offloaded": (24.0, 40.0, 6.90),
    "eager": (82.0, 9.0, 0.95),
}


def make_case(strategy: str = "naive", **changes: Any) -> Case:
    """A training step of DenseNet-121 on the synthetic GPU, with some fields changed."""
    case = Case(
        "step",
        "resnet50" if strategy == "eager" else "densenet121",
        strategy,
        "train",
        64,
        (3, 224, 224),
        autocast="bfloat16",
        memory_format="channels_last",
        device="cuda",
    )
    return dataclasses.replace(case, **changes)


def make_record(case: Case, status: str = "ok", **fields: Any) -> Record:
    """A record of a case in the synthetic environment."""
    fields.setdefault("environment", environment(case.device))
    return Record(case, status, run="synthetic", created="2000-01-01T00:00:00+00:00", **fields)  # type: ignore[arg-type]


def timed(
    case: Case, peak_delta_bytes: int, samples: Sequence[float], group: str = "group", **fields: Any
) -> Record:
    """A record with memory and time; the constant part is 64 MiB."""
    timing = timing_of(samples)
    peak = peak_delta_bytes + 64 * MIB
    fields.setdefault("turns", f"turns of {group}")
    return make_record(
        case,
        peak_delta_bytes=peak_delta_bytes,
        peak_allocated_bytes=peak,
        baseline_allocated_bytes=64 * MIB,
        time_s=timing,
        throughput_img_s=case.batch / timing.median,
        group=group,
        **fields,
    )


def timing_of(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    return Timing(quantile(0.5), quantile(0.25), quantile(0.75), ordered[0], len(ordered), tuple(samples))


def environment(device: str = "cuda") -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": "Synthetic GPU" if device == "cuda" else "Synthetic CPU (2 threads)",
        "python": "3.11.0",
        "os": "Synthetic OS",
        "cpu": "Synthetic CPU",
        "threads": 2,
        "memory_bytes": 64 * GIB,
        "packages": {"torch": "0.0.0", "densebench": "0.0.0"},
        "flags": {"cudnn_benchmark": False, "matmul_precision": "highest"},
        "allocator": {},
        "commit": "0" * 40,
        "dirty": True,
        "argv": ["pytest", "benchmarks", "--benchmark-only"],
    }
    if device == "cuda":
        facts["gpu"] = {"name": "Synthetic GPU", "memory_bytes": GPU_BYTES, "driver": "0.0"}
    return facts


def gpu_run() -> list[Record]:
    """A full run on a 24 GiB device: batches up to where contenders no longer fit, and everything else."""
    records: list[Record] = []
    for batch in (1, 4, 16, 64, 128, 256):
        records += network_group(make_case(batch=batch))
    records += network_group(make_case(mode="infer"), memory_scale=0.04, time_scale=0.3)
    records += network_group(
        make_case(model="densenet_bc", input_shape=(3, 32, 32), autocast=None), memory_scale=0.3
    )
    records += network_group(make_case(model="densenet201"), memory_scale=1.6, time_scale=1.5)
    records += [*depth_records("measured"), *depth_records("predicted"), *timelines(), *full_size()]
    return [*records, *kernel_records(), *fit_records()]


def cpu_run() -> list[Record]:
    """A quick run on a processor: small batches, no limit to meet, no kernels."""
    case = make_case(batch=2, autocast=None, device="cpu")
    records = [
        *network_group(case, time_scale=20.0),
        *network_group(dataclasses.replace(case, mode="infer"), 0.04),
    ]
    depth = [dataclasses.replace(r.case, device="cpu") for r in depth_records()]
    records += [power_law(c.strategy, c.options["block_config"][0], device="cpu") for c in depth]
    return [*records, *timelines(), *full_size()]


def network_group(case: Case, memory_scale: float = 1.0, time_scale: float = 1.0) -> list[Record]:
    """All contenders in one setting; those beyond the device's memory ran out of it."""
    names = [*STRATEGIES, *PEERS, *(["eager"] if case.model == "densenet121" else [])]
    group = f"{case.mode} {case.model} {case.batch}"
    draw = random.Random(group)
    drift = [1 + 0.01 * draw.random() for _ in range(20)]
    records = []
    for name in names:
        own = dataclasses.replace(case, strategy=name, model="resnet50" if name == "eager" else case.model)
        per_image, fixed, slope = _CONTENDERS[name]
        needed = int(per_image * memory_scale * MIB * case.batch + 30 * MIB)
        records.append(_outcome(own, needed, time_scale * (fixed + slope * case.batch) / 1e3, group, drift, draw))
    return records


def _outcome(
    case: Case, needed: int, seconds: float, group: str, drift: Sequence[float], draw: random.Random
) -> Record:
    if case.strategy == "timm":
        return make_record(case, "unsupported", reason="timm is not installed; pip install 'densebench[peers]'")
    if needed > 0.95 * GPU_BYTES:
        return make_record(case, "oom", reason="CUDA out of memory. Tried to allocate 98.00 MiB.")
    samples = [seconds * common * (1 + 0.004 * draw.random()) for common in drift]
    extra: dict[str, Any] = {"max_error_vs_reference": 1.1e-3, "flops_model": 17 * 10**9 * case.batch}
    if case.strategy == "torchvision_checkpointed" and case.mode == "train":
        extra |= {"status": "incorrect", "reason": "buffers is off by 7.0e-02 (naive: 7.3e-03)"}
    record = timed(case, needed, samples, group)
    peak = record.peak_allocated_bytes or 0
    return dataclasses.replace(
        record,
        predicted_peak_bytes=int(peak * (0.97 + 0.04 * draw.random())),
        workspace_bytes=64 * MIB,
        peak_allocated_bytes=peak + 64 * MIB,
        throttled=False,
        compile_s=41.0 if case.strategy == "compiled" else None,
        **extra,
    )


def depth_records(source: str = "measured", depths: Iterable[int] = DEPTHS) -> list[Record]:
    """Naive grows almost with the square of the depth, the others in proportion to it."""
    return [power_law(name, depth, source) for name in STRATEGIES for depth in depths]


def power_law(name: str, depth: int, source: str = "measured", **changes: Any) -> Record:
    power, factor = (1.9, 0.02 * MIB) if name == "naive" else (1.0, _CONTENDERS[name][0] * 4e-3 * MIB)
    case = make_case(
        name,
        kind="depth",
        model="densenet_x",
        batch=1,
        input_shape=(3, 16, 16),
        autocast=None,
        source=source,
        device="cpu" if source == "predicted" else "cuda",
        options={"block_config": [depth], "growth_rate": 12},
    )
    return make_record(dataclasses.replace(case, **changes), peak_delta_bytes=round(factor * depth**power))


def timelines() -> list[Record]:
    """Memory rises through forward and falls through backward."""
    records = []
    for name in STRATEGIES:
        height = int(_CONTENDERS[name][0] * 8 * MIB)
        events = tuple(range(0, 1000, 5))
        forward_end = 300
        shape = [e / forward_end if e <= forward_end else (1000 - e) / 700 for e in events]
        bands = {
            "activations": tuple(int(height * share**0.5) for share in shape),
            "temporaries": tuple(int(0.1 * height * (e % 50) / 50) for e in events),
            "parameters": (32 * MIB,) * len(events),
            "gradients": (32 * MIB,) * len(events),
            "buffers": (MIB,) * len(events),
            "input": (5 * MIB,) * len(events),
        }
        case = make_case(name, kind="timeline", batch=8, autocast=None, source="predicted", device="cpu")
        records.append(make_record(case, timeline=Timeline(events, bands, forward_end)))
    return records


def full_size() -> list[Record]:
    """Predicted steps, without times."""
    records = []
    for name in (*STRATEGIES, "torchvision", "eager"):
        needed = int(2 * _CONTENDERS[name][0] * 64 * MIB)
        case = make_case(name, autocast=None, source="predicted", device="cpu")
        records.append(
            make_record(
                case,
                peak_delta_bytes=needed,
                peak_allocated_bytes=needed + 102 * MIB,
                predicted_peak_bytes=needed + 102 * MIB,
                baseline_allocated_bytes=102 * MIB,
                flops_executed=10**12,
            )
        )
    return records


def kernel_records() -> list[Record]:
    """Two operators on the shapes of some layers: one bound by memory, one nearer to the matmul rate."""
    facts = environment() | {"ceilings": {"copy_gb_s": 800.0, "matmul_tflops": 100.0}}
    records = []
    for operator, outputs in (("bn_relu_conv1x1", 128), ("bn_relu_pool", 0)):
        for layer, columns in enumerate((64, 128, 256, 512)):
            rows = 64 * 56 * 56
            moved = 2 * rows * (columns + outputs)
            draw = random.Random(f"{operator} {layer}")
            for name, slowdown in (("ours", 1.25), ("eager", 2.9), ("compiled", 1.8), ("cudnn", 1.6)):
                seconds = slowdown * moved / 800e9
                options = {"block": 1, "layer": layer, "rows": rows, "columns": columns, "outputs": outputs}
                case = make_case(name, kind="kernel", model=operator, mode="forward", options=options)
                record = timed(case, MIB, [seconds * (1 + 0.01 * draw.random()) for _ in range(20)], "kernels")
                flops = 2 * rows * columns * outputs or None
                records.append(
                    dataclasses.replace(record, bytes_moved=moved, flops_executed=flops, environment=facts)
                )
    return records


def fit_records() -> list[Record]:
    """The largest batches that were found by trying, for two of the capacities."""
    return [
        make_record(
            make_case(name, kind="fit", batch=1, options={"capacity_gib": gib, "largest_batch": gib * per_gib})
        )
        for name, per_gib in (("naive", 7), ("fused", 30))
        for gib in (8, 16)
    ]


CODE = [
    {
        "kernel": "bn_relu_conv1x1",
        "target": "sm_90",
        "triton": "0.0.0",
        "registers": 128,
        "spill_bytes": 0,
        "shared_bytes": 98304,
        "instructions": 1400,
        "wgmma": 16,
        "configuration": {"BLOCK_ROWS": 128, "warps": 4},
    }
]


def write(records: Iterable[Record], path: Path) -> Path:
    """A file of records, as a run leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")
    return path


def learning_run(strategies: Sequence[str] = STRATEGIES, epochs: int = 3, steps: int = 50) -> list[EpochRecord]:
    """A training run whose strategies learn nearly the same."""
    return [
        EpochRecord(
            strategy=name,
            epoch=epoch,
            step_losses=tuple(
                2.3 / (epoch + step / steps) + 0.01 * at + 0.1 * math.sin(step) for step in range(steps)
            ),
            train_loss=2.3 / epoch,
            train_accuracy=0.25 * epoch,
            test_loss=None if epoch == 1 else 2.3 / epoch,
            test_accuracy=0.1 + 0.2 * epoch,
            seconds=12.0,
            images_per_s=100.0,
            peak_delta_bytes=(24 - 4 * at) * MIB,
            options={
                "model": "densenet121",
                "batch": 32,
                "optimizer": "sgd",
                "lr": 0.1,
                "autocast": None,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "weights": None,
                "seed": 0,
            },
            images={
                "source": "synthetic images",
                "train": 4096,
                "test": 512,
                "classes": 10,
                "shape": [3, 224, 224],
            },
            environment={"device": "Synthetic CPU (8 threads)"},
            created="2026-11-29T00:00:00+00:00",
        )
        for at, name in enumerate(strategies)
        for epoch in range(1, epochs + 1)
    ]
