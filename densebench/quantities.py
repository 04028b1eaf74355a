"""Everything that a run of a network leaves behind, by name: what two runs are compared in.

Names: output (or output[0], output['out']), loss, input gradient, gradient NAME, buffer NAME and, after optimizer
steps, parameter NAME; input and gradient of the output as they were left. Of several steps each is said which.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from densebench.formats import CHANNELS_LAST, memory_format_of
from densebench.models import set_strategy

COUNTER = "num_batches_tracked"
SEEDS_APART = 1000  # of the gradients of several outputs

Quantities = dict[str, Tensor | None]


@dataclass(frozen=True)
class Run:
    """What every run that is compared is given: weights, inputs, dtype, seeds."""

    model: nn.Module
    inputs: list[Tensor]
    autocast: torch.dtype | None
    input_gradient: bool
    learning_rate: float
    seed: int

    def by(
        self,
        strategy: str | nn.Module,
        order: Tensor | None = None,
        double: bool = False,
        nudge: int | None = None,
        last: bool = False,
    ) -> Quantities:
        """Every quantity of a run by a strategy.

        Args:
            strategy: its name; or another network, to be run as it is.
            order: a permutation of the images; results come back in the original order.
            double: run in float64 and without autocast, from the same weights and inputs.
            nudge: seed of changes to the inputs, smaller than what rounding them changes.
            last: lay the inputs out channels-last.
        """
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.model if isinstance(strategy, str) else strategy)
        model = set_strategy(model, strategy) if isinstance(strategy, str) else model
        model = model.double() if double else model
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)],
            self.learning_rate,
            momentum=0.9,
        )
        quantities: Quantities = {}
        inputs = self.inputs if nudge is None else [self._nudged(x, nudge) for x in self.inputs]
        formats = [CHANNELS_LAST.get(x.dim()) if last else memory_format_of(x) for x in self.inputs]
        inputs = [x if form is None else x.to(memory_format=form) for x, form in zip(inputs, formats, strict=True)]
        for number, original in enumerate(inputs, 1):
            prefix = f"step {number}: " if len(self.inputs) > 1 else ""
            optimizer.zero_grad()
            step = self._step(model, original, order, double, number)
            quantities |= {prefix + name: value for name, value in step.items()}
            optimizer.step()
        if self.learning_rate:
            quantities |= {f"parameter {n}": p.detach() for n, p in model.named_parameters()}
        return quantities

    def draws_dropout(self) -> bool:
        """Whether other images, or the same in other places, would be given other zeros."""
        modules = self.model.modules()
        return any(getattr(module, "drop_rate", 0.0) > 0 and module.training for module in modules)

    def _nudged(self, x: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        unit = torch.finfo(self.autocast or x.dtype).eps / 2
        change = 1 + unit * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
        return (x.double() * change.to(x.device)).to(x.dtype)

    def _step(
        self, model: nn.Module, original: Tensor, order: Tensor | None, double: bool, number: int
    ) -> Quantities:
        order = torch.arange(len(original), device=original.device) if order is None else order
        input = original.detach()[order].to(memory_format=memory_format_of(original))
        input = input.double() if double else input
        input.requires_grad_(self.input_gradient)
        with torch.autocast(input.device.type, self.autocast, enabled=self.autocast is not None and not double):
            outputs = _tensors_of(model(input))
        seed = self.seed + number
        upstream = {
            name: _in_order(_upstream(output, seed + SEEDS_APART * index), order)
            for index, (name, output) in enumerate(sorted(outputs.items()))
        }
        loss = torch.stack([(output * upstream[name]).sum() for name, output in outputs.items()]).sum()
        graphs = [name for name, output in outputs.items() if output.requires_grad]
        if graphs:
            torch.autograd.backward([outputs[name] for name in graphs], [upstream[name] for name in graphs])
        back = torch.argsort(order)
        return {
            **{name: _in_order(output.detach(), back) for name, output in outputs.items()},
            "loss": loss.detach(),
            "input gradient": None if input.grad is None else input.grad[back],
            # What the strategy was given, as it left it: neither is its to write to.
            "input": input.detach()[back],
            **{f"gradient of the {name}": _in_order(value, back) for name, value in upstream.items()},
            **{f"gradient {n}": p.grad for n, p in model.named_parameters()},
            **{f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()},
        }


def of_a_step(name: str) -> str:
    """A quantity's name without its step's: output, output['out'], loss, input, input gradient, buffer x.y."""
    return re.sub(r"^step \d+: ", "", name)


def in_order_of_computation(names: Iterable[str]) -> list[str]:
    """The names of a run's quantities, earlier steps first: what comes after a wrong one inherits its error.

    Buffers as the layers follow each other, for a forward writes them on its way; outputs; gradients from the last
    layer's back to the input's; parameters, and what must not change at all.
    """
    names = list(names)

    def place(at: int) -> tuple[int, int, int]:
        name = of_a_step(names[at])
        step = re.match(r"step (\d+): ", names[at])
        number = int(step[1]) if step else 0
        if name.startswith("parameter "):
            return len(names), 4, at
        if name.startswith("buffer "):
            return number, 0, at
        if name == "loss" or name.startswith("output"):
            return number, 1, at
        if name == "input gradient":
            return number, 3, at
        if name.startswith("gradient ") and not name.startswith("gradient of the output"):
            return number, 2, -at
        return number, 4, at

    return [names[at] for at in sorted(range(len(names)), key=place)]


def is_buffer(name: str) -> bool:
    return of_a_step(name).startswith("buffer ")


def is_computed(name: str) -> bool:
    """Neither given nor only counted."""
    plain = of_a_step(name)
    return plain != "input" and not plain.startswith("gradient of the output") and not plain.endswith(COUNTER)


def _tensors_of(output: object) -> dict[str, Tensor]:
    """What a network returns, by where it stands: output, or output[0], output['out']."""
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(output)[0] if leaf is not None]
    others = [
        "complex numbers" if isinstance(leaf, Tensor) else type(leaf).__name__
        for _, leaf in leaves
        if not isinstance(leaf, Tensor) or leaf.is_complex()
    ]
    if others or not leaves:
        raise ValueError(
            f"the network returns {', '.join(others) or 'nothing'}; what can be compared are real tensors, and "
            "lists, tuples and dictionaries of them: a module around it can pick them out"
        )
    return {f"output{keystr(path)}": leaf for path, leaf in leaves}


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    """One row an image; what has another number of rows, as a loss, has no order."""
    return rows[order] if rows.shape[:1] == order.shape else rows.clone()


def _upstream(output: Tensor, seed: int) -> Tensor:
    """A random gradient of the output, the same in every dtype: drawn in float32, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(output.shape, generator=generator).bfloat16()
    return values.to(output.device, output.dtype)
