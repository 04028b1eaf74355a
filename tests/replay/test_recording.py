"""What a recorder notes of a function, and what comes of it when it is played back; functions without kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from densebench.kernels.bn_relu import bn_relu
from densebench.kernels.started import STREAM, Started, watcher
from densebench.replay import playback
from densebench.replay.layout import NotAsRecordedError
from densebench.replay.playback import Playback, Recording
from densebench.replay.recorder import Recorder
from densebench.replay.recording import Tensors

Plain = Callable[..., Tensor | tuple[Tensor | None, ...] | None]


def recorded(*calls: tuple[Plain, Tensors]) -> Recorder:
    """A recorder that has seen functions of tensors, one a segment."""
    recorder = Recorder()
    for function, inputs in calls:
        recorder.segment(_of_list(function), list(inputs))
    return recorder


def _of_list(function: Plain) -> Callable[[Tensors], tuple[Tensors, None]]:
    def of_list(inputs: Tensors) -> tuple[Tensors, None]:
        found = function(*inputs)
        return list(found) if isinstance(found, tuple) else [found], None

    return of_list


def played(recorder: Recorder, *inputs: Tensors) -> list[Tensors]:
    """What each segment gives for other inputs."""
    assert recorder.refusal is None
    playback = Playback(Recording(recorder.segments))
    return [playback.advance(list(given)) for given in inputs]


def slices(x: Tensor) -> tuple[Tensor, Tensor]:
    whole = x.new_empty(4, 6)
    whole[:, :3] = x
    whole[:, 3:] = x.t().contiguous().t() + 1
    return whole, whole[1:, ::2].t()


def lists(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    made = [torch.empty_like(x), torch.empty_like(y)]
    torch._foreach_copy_(made, [x, y])
    return tuple(torch._foreach_mul(made, [2.0, 3.0]))


def out(x: Tensor) -> Tensor:
    found = x.new_zeros(2, 3)
    torch.sum(x, 0, out=found[1])
    return found


def several_results(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, 0)
    return mean, var


def written_input(x: Tensor) -> Tensor:
    return x[:2].mul_(3)


def nothing(x: Tensor) -> tuple[Tensor, None, Tensor]:
    return x, None, x.new_empty(0)


FUNCTIONS: dict[str, tuple[Plain, int]] = {
    function.__name__: (function, number)
    for function, number in [
        (slices, 1), (lists, 2), (out, 1), (several_results, 1), (written_input, 1), (nothing, 1),
    ]
}  # fmt: skip


def some(number: int, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator) for _ in range(number)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_played_on_other_inputs(name: str) -> None:
    function, number = FUNCTIONS[name]
    recorder = recorded((function, some(number, seed=1)))
    mine, others = some(number, seed=2), some(number, seed=2)
    (actual,) = played(recorder, mine)
    found = function(*others)
    expected = list(found) if isinstance(found, tuple) else [found]
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (torch.equal(a, b) and a.stride() == b.stride())
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))  # what is written, too


def test_inputs_that_are_views_of_others_memory() -> None:
    """Before and behind them is what is not theirs."""
    recorder = recorded((lambda x: x[1:] * 2, [torch.randn(40).view(10, 4)[2:6, :3]]))
    x = torch.randn(60).view(15, 4)[7:11, 1:]
    ((actual,),) = played(recorder, [x])
    assert torch.equal(actual, x[1:] * 2)


def test_what_one_segment_leaves_the_next_finds() -> None:
    kept: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        kept.append(x + 1)
        return x * 2

    def second(y: Tensor) -> Tensor:
        return kept.pop() - y

    x, y = some(2, seed=1)
    recorder = recorded((first, [x]), (second, [y]))
    x, y = some(2, seed=2)
    (doubled,), (difference,) = played(recorder, [x], [y])
    assert torch.equal(doubled, x * 2)
    assert torch.equal(difference, x + 1 - y)


def test_autograd_is_told_of_what_is_written() -> None:
    """Of lists, too, while it is recorded: PyTorch says nothing of them where a dispatch mode is on."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        torch._foreach_add_([x], 1)
        return y.add_(1)

    inputs = some(2, seed=1)
    recorder = recorded((function, inputs))
    others = some(2, seed=2)
    played(recorder, others)
    assert [x._version for x in [*inputs, *others]] == [1] * 4


def test_other_inputs_than_were_recorded_are_refused() -> None:
    recorder = recorded((lambda x: x * 2, [torch.ones(4, 3)]))
    for other in (torch.ones(3, 4), torch.ones(4, 3).double(), torch.ones(4, 3, device="meta")):
        with pytest.raises(NotAsRecordedError, match=r"was torch.float32 of shape \[4, 3\] on cpu, and is now"):
            played(recorder, [other])


def test_inputs_that_lie_in_another_way() -> None:
    """Their values are what counts, unless they are written into."""
    inputs = [torch.randn(4, 3), torch.randn(4, 8)[:, 2:5], torch.randn(5)[1:], torch.randn(3, 4).t()]
    recorder = recorded((lambda *xs: tuple(x * 2 for x in xs), inputs))
    others = [torch.randn(3, 4).t(), torch.randn(4, 3), torch.randn(8)[::2], torch.randn(4, 5)[:, 1:4]]
    (actual,) = played(recorder, others)
    for found, other in zip(actual, others, strict=True):
        assert found is not None
        assert torch.equal(found, other * 2)
    written = recorded((lambda x: x.mul_(2), [torch.randn(4, 3)]))
    with pytest.raises(NotAsRecordedError):
        played(written, [others[0]])


def test_other_results_than_were_recorded_are_refused() -> None:
    """An operator may look at what is set elsewhere."""
    x = torch.ones(3, 3)
    recorder = recorded((lambda x: torch.mm(x, x).add_(1), [x]))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotAsRecordedError, match=r"aten\.mm"):
        played(recorder, [x])


def test_what_is_started_is_handed_its_arguments() -> None:
    """Addresses and the stream however deep they stand; what is always the same is not made anew."""
    handed: list[tuple[object, ...]] = []
    constant = [None, ("a", 2)]
    x = torch.ones(4)

    def function(given: Tensor) -> Tensor:
        tell = watcher()
        assert tell is not None
        arguments = (constant, (1, (given[2:], STREAM)), given)
        tell(Started(lambda *arguments: handed.append(arguments), "noted", arguments, None))
        return given

    recorder = recorded((function, [x]))
    with mock.patch.object(playback, "current_stream", return_value=77):
        played(recorder, [x])
    ((first, nested, address),) = handed
    assert nested == (1, (x[2:].data_ptr(), 77))
    assert first is constant
    assert address == x.data_ptr()


@pytest.mark.parametrize("offset", [0, 1])
def test_addresses_are_aligned_as_they_were(offset: int) -> None:
    """Kernels are compiled for that."""
    alignments: list[int] = []

    def function(given: Tensor) -> Tensor:
        tell = watcher()
        assert tell is not None
        tell(Started(lambda address: alignments.append(address % 16), "noted", (given,), None))
        return given

    recorder = recorded((function, [torch.ones(9)[offset:][:8]]))
    for other in range(4):
        values = torch.arange(12.0)[other:][:8]
        ((found,),) = played(recorder, [values])
        assert torch.equal(found, values)  # type: ignore[arg-type]
    assert len(set(alignments)) == 1


def test_random_numbers_are_drawn_anew() -> None:
    recorder = recorded((lambda x: torch.nn.functional.dropout(x, 0.5), [torch.ones(100)]))
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(torch.ones(100), 0.5)
    torch.manual_seed(3)
    ((actual,),) = played(recorder, [torch.ones(100)])
    assert torch.equal(actual, expected)


def test_memory_goes_after_its_last_use() -> None:
    alive: list[weakref.ref[torch.UntypedStorage]] = []

    def note(made: Tensor) -> None:
        alive.append(weakref.ref(made.untyped_storage()))

    def function(x: Tensor) -> Tensor:
        return (x + 1).exp().mul(2)

    recorder = recorded((function, [torch.ones(3)]))
    recording = Recording(recorder.segments)
    lines = recording.sources[0].splitlines()
    released = [line.split()[1:] for line in lines if line.strip().startswith("del")]
    assert released == [["t0"], ["t1"], ["t2"]]
    x = [torch.ones(3)]
    note(x[0])
    found = Playback(recording).advance(x)
    assert x == []
    assert alive[0]() is None
    assert torch.equal(found[0], function(torch.ones(3)))


def test_what_is_not_used_is_not_held() -> None:
    recorder = recorded((lambda x, y: x + 1, some(2, seed=1)))
    assert "t1" not in Recording(recorder.segments).sources[0]


def test_views_are_no_steps() -> None:
    recorder = recorded((lambda x: x.view(2, 2, 3).permute(1, 0, 2).select(0, 1).unsqueeze(1), [torch.ones(4, 3)]))
    (segment,) = recorder.segments
    assert segment.steps == ()


def bn_relu_into(x: Tensor, out: Tensor) -> Tensor:
    """A kernel of ours, of which autograd would not be told."""
    bn_relu(x, x[0], x[0], None, None, 1e-5, out)
    return out


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Their values lie beside each other in every row."""
    return x[:, :3], x[:, 3:]


@torch.library.custom_op("densebench_tests::middle", mutates_args=())
def middle(x: Tensor) -> Tensor:
    """Its result does not begin where its memory does."""
    return x.repeat(3)[3:-3]


STRANGER = torch.ones(3)
REFUSED: dict[str, tuple[Plain, Tensors, str]] = {
    "values": (lambda x: x * x.sum().item(), [torch.ones(3)], "returns what is no tensor"),
    "strangers": (lambda x: x + STRANGER, [torch.ones(3)], "neither given nor made here"),
    "bits": (lambda x: x.view(torch.int32) + 1, [torch.ones(3)], "read as torch.int32"),
    "twice": (lambda x, y: x + y, [torch.ones(3)] * 2, "two inputs that share memory"),
    "before": (lambda x, y: x + y, [*_halves(torch.ones(4, 6))][::-1], "two inputs that share memory"),
    "negated": (lambda x: x + 1, [torch._neg_view(torch.ones(3))], "lazily negated"),
    "within": (middle, [torch.ones(3)], "lies within more memory"),
    "theirs": (bn_relu_into, [torch.ones(4, 3), torch.zeros(4, 3)], "writes into an input"),
    "shared": (lambda x, y: x + y, list(torch.ones(6).as_strided((2, 4), (2, 1))), "two inputs that share memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_played_back_runs_all_the_same(name: str) -> None:
    function, inputs, reason = REFUSED[name]
    recorder = Recorder()
    (found,), _ = recorder.segment(_of_list(function), list(inputs))
    assert found is not None
    assert torch.equal(found, function(*inputs))  # type: ignore[arg-type]
    assert recorder.refusal is not None
    assert reason in recorder.refusal


def test_what_goes_wrong_in_noting_it_is_a_refusal() -> None:
    recorder = Recorder()
    with mock.patch.object(Recorder, "_called", side_effect=KeyError("announced")):
        (found,), _ = recorder.segment(_of_list(lambda x: x + 1), [torch.ones(3)])
    assert torch.equal(found, torch.full((3,), 2.0))
    assert recorder.refusal == "'announced'"


def test_an_error_is_no_refusal() -> None:
    def failing(x: Tensor) -> Tensor:
        raise ValueError("announced")

    recorder = Recorder()
    with pytest.raises(ValueError, match="announced"):
        recorder.segment(_of_list(failing), [torch.ones(3)])
    assert recorder.refusal is None
    assert recorder.segments == []


def test_memory_that_is_used_again_is_other_memory() -> None:
    """What is freed and made anew may lie at the same address."""

    def function(x: Tensor) -> Tensor:
        total = torch.zeros(1000)
        for number in range(5):
            made = torch.full((1000,), float(number))
            total += made * x
            del made
        return total

    recorder = recorded((function, [torch.ones(1)]))
    ((actual,),) = played(recorder, [torch.full((1,), 2.0)])
    assert torch.equal(actual, torch.full((1000,), 20.0))
