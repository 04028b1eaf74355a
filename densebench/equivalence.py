"""What equal means for two runs of a network: used by the tests and by anyone with a strategy of their own.

Two runs are equal if outputs, loss, input gradient, every parameter gradient by name, every buffer and, after
optimizer steps, every parameter agree, and both leave what they were given as it was. In float64 the gate is
absolute, because correct code that only orders its sums differently agrees to 1e-13 there and wrong code does
not. In lower precision a strategy may err twice as much as its reference does, both against the reference in
float64 (FlashAttention's rule). One run's error is one draw: where a value next to zero is rectified or not, or
a small gradient is all cancellation, two right runs differ by more than twice. So the reference's error is the
largest of a few runs, with inputs nudged within their rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from densebench.models.features import stages_in
from densebench.quantities import (
    COUNTER,
    Quantities,
    Run,
    in_order_of_computation,
    is_buffer,
    is_computed,
    of_a_step,
)

# Norm of the difference over norm of the reference. Buffers are plain averages of what the forward computed.
GATE_FLOAT64 = 1e-11
GATE_BUFFERS_FLOAT64 = 1e-13
# Where sums of rounding errors are compared (a norm's bias before another norm has gradient zero), an error
# counts only beyond what the reference itself shows when the images of its batch change places or their last
# bits change.
NOISE_FACTOR = 3.0
NOISE_RUNS = 6
# A strategy's error against float64 over its reference's (the largest of so many), and what needs no excuse.
ERROR_FACTOR = 2.0
ERROR_RUNS = 9
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Difference:
    """How one quantity of two runs differs: |difference| / |reference| (norms), and the gate for it."""

    name: str
    error: float
    gate: float

    @property
    def within(self) -> bool:
        return self.error <= self.gate  # false for NaN


def assert_equivalent(
    model: nn.Module,
    strategy: str,
    inputs: Tensor | Sequence[Tensor],
    reference: str | nn.Module = "naive",
    *,
    autocast: torch.dtype | None = None,
    input_gradient: bool = True,
    learning_rate: float = 0.0,
    seed: int = 0,
) -> list[Difference]:
    """Run a model by two strategies from the same weights on the same inputs and compare everything.

    Args:
        model: contains at least one densebench DenseNet; it is copied and left as it is, mode included.
        strategy: the name of the strategy that is to be equal.
        reference: that of the one that it is to be equal to; or the network that this one was converted from (a
            copy made before), with the same parameters under the same names.
        inputs: [N, C, H, W] (volumes [N, C, D, H, W]), or several for as many steps. What comes out is a tensor,
            or tensors in lists, tuples and dictionaries, as feature pyramids return them.
        autocast: dtype to run both under, or None.
        input_gradient: whether the inputs need a gradient.
        learning_rate: of plain SGD with momentum 0.9 after each step; 0 leaves the parameters alone.
        seed: of dropout and of the gradient of the output.

    Returns:
        Every quantity compared, with its error and gate: what was measured, for reports.

    Raises:
        AssertionError: naming the worst quantity, its index, both values, its error and its gate, and the quantity
            that differs first in the order of computation.
        ValueError: if there are no inputs, the reference has been converted, too, or what comes out holds anything
            but tensors; and as `densebench.set_strategy`.
        UnsupportedError: as `densebench.set_strategy`.
    """
    if isinstance(reference, nn.Module) and stages_in(reference):
        raise ValueError(
            "the reference has dense blocks of densebench: give a strategy's name, or the network as it was "
            "before convert, which works in place; copy.deepcopy makes one that stays"
        )
    steps = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not steps:
        raise ValueError("there are no inputs to compare runs on: give a tensor, or several for as many steps")
    run = Run(model, steps, autocast, input_gradient, learning_rate, seed)
    expected, actual = run.by(reference), run.by(strategy)
    _assert_comparable(expected, actual)
    exact = steps[0].dtype == torch.float64
    differences = _compare_exactly(run, reference, expected, actual) if exact else None
    if differences is None:
        differences = _compare_errors(run, reference, expected, actual)
    wrong = {difference.name: difference for difference in differences if not difference.within}
    if wrong:
        named = isinstance(reference, str)
        other = repr(reference) if named else f"the {type(reference).__name__} given"
        told = _told(wrong, expected, actual, converted=not named)
        raise AssertionError(f"strategy {strategy!r} differs from {other} in {told}")
    return differences


def _told(wrong: dict[str, Difference], expected: Quantities, actual: Quantities, converted: bool) -> str:
    """The worst difference, and the first: where to look, for what comes later inherits it."""
    worst = max(wrong.values(), key=lambda one: one.error / one.gate if one.error == one.error else float("inf"))
    more = f" ({len(wrong) - 1} more quantities differ)" if len(wrong) > 1 else ""
    first = wrong[next(name for name in in_order_of_computation(expected) if name in wrong)]
    begins = "" if first is worst else f"; the first in the order of computation: {first.name}, {first.error:.2e}"
    twice = converted and worst.name.endswith(COUNTER)
    hint = "; checkpoints (memory_efficient) move running statistics twice: switch them off" if twice else ""
    return (
        f"{worst.name}: relative error {worst.error:.2e} against a gate of {worst.gate:.2e}; "
        f"{_largest_difference(expected[worst.name], actual[worst.name])}{more}{begins}{hint}"
    )


def _compare_exactly(
    run: Run, reference: str | nn.Module, expected: Quantities, actual: Quantities
) -> list[Difference]:
    """The float64 gates; self-noise widens them only for quantities that are rounding errors themselves."""
    differences = []
    noise: list[Quantities] = []
    for name, value in expected.items():
        other = actual[name]
        if value is None or other is None:
            continue
        gate = GATE_BUFFERS_FLOAT64 if is_buffer(name) else GATE_FLOAT64
        error = _relative(other, value)
        if not error <= gate:
            if not noise:
                noise = [run.by(reference, nudge=seed) for seed in range(1, NOISE_RUNS)]
                # Dropout would be drawn for other images.
                if not run.draws_dropout():
                    noise += _of_other_places(
                        run.by(reference, order=torch.randperm(len(run.inputs[0]))), expected
                    )
            own = max(_relative(each, value) for each in (one[name] for one in noise) if each is not None)
            gate = max(gate, NOISE_FACTOR * own)
        differences.append(Difference(name, error, gate))
    return differences


def _of_other_places(permuted: Quantities, expected: Quantities) -> list[Quantities]:
    """A run whose images changed places, if that is all that changed.

    It is not where rows of an output are not images: gradients given to it are other images' then, and gates made
    of such a run would let anything pass.
    """
    for name, value in expected.items():
        other = permuted[name]
        if value is None or other is None or not of_a_step(name).startswith("output"):
            continue
        if not _relative(other, value) <= 1e-6:
            return []
    return [permuted]


def _compare_errors(
    run: Run, reference: str | nn.Module, expected: Quantities, actual: Quantities
) -> list[Difference]:
    """Errors against the reference in float64, at most twice the reference's own."""
    exact = run.by(reference, double=True)
    # In both memory formats: on a CPU PyTorch's norms sum contiguous maps in float64, channels-last ones not.
    references = [expected, *(run.by(reference, nudge=seed, last=seed % 2 == 0) for seed in range(1, ERROR_RUNS))]
    dtype = run.autocast or run.inputs[0].dtype
    differences = []
    for name, truth in exact.items():
        value, other = expected[name], actual[name]
        if truth is None or value is None or other is None or of_a_step(name) == "loss":
            continue  # the loss is a sum of outputs that cancel: which run is nearer by how much is chance
        floor = FLOORS[torch.float32 if is_buffer(name) and value.dtype == torch.float32 else dtype]
        own = max(_relative(each, truth) for each in (one[name] for one in references) if each is not None)
        gate = max(ERROR_FACTOR * own, floor)
        differences.append(Difference(name, _relative(other, truth), gate))
    return differences


def _assert_comparable(expected: Quantities, actual: Quantities) -> None:
    """Both runs have the same quantities, dtypes and Nones, and share no memory."""
    _require(expected.keys() == actual.keys(), f"different quantities: {expected.keys() ^ actual.keys()}")
    storages = {t.untyped_storage().data_ptr() for t in expected.values() if t is not None and t.numel()}
    for name, value in expected.items():
        other = actual[name]
        _require(
            (value is None) == (other is None),
            f"{name} is {'missing' if other is None else 'there'} and should "
            f"{'not be' if value is None else 'be there'}",
        )
        if value is None or other is None:
            continue
        _require(value.dtype == other.dtype, f"{name} is {other.dtype}, the reference's {value.dtype}")
        _require(value.shape == other.shape, f"{name} has shape {other.shape}, the reference's {value.shape}")
        if other.numel():
            shared = other.untyped_storage().data_ptr() in storages
            _require(not shared, f"{name} lies in memory of the reference's run: it would be compared with itself")
    computed = [value for name, value in expected.items() if value is not None and is_computed(name)]
    size = sum(float(value.double().abs().nan_to_num().sum()) for value in computed)
    _require(size > 0, "the reference's run is all zeros: nothing could differ")


def _require(holds: bool, otherwise: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(otherwise)


def _relative(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| as norms in float64; 0 where both are the same, NaN included.

    Where the reference is zero throughout, |value|: relative to nothing every rounding error is infinite, the
    reference's own too, and a gate made of that would let anything pass.
    """
    a, b = value.double(), reference.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    difference = torch.where(same, 0.0, a - b).norm()
    size = torch.where(b.isfinite(), b, 0.0).norm()
    return float(difference / size) if size > 0 else float(difference)


def _largest_difference(expected: Tensor | None, actual: Tensor | None) -> str:
    """Where two tensors differ most, in words."""
    assert expected is not None
    assert actual is not None
    difference = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    place = torch.unravel_index(difference.argmax(), difference.shape) if difference.dim() else ()
    index = tuple(int(i) for i in place)
    return f"at {list(index)} it is {actual[index].item()!r}, the reference {expected[index].item()!r}"
