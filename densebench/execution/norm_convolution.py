"""A dense layer's norm-ReLU-3x3 over the rows of a stage, and its backward.

In one pass each where the kernels take it: on a CPU, in float32 and float64, with small dilations. Elsewhere
operator by operator, the convolution being the library's, which reads relu(norm(x)) from memory.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from densebench.execution.convolution import convolution_backward, convolve
from densebench.execution.pixels import Pixels, Scratch
from densebench.execution.plan import ConvUnit, Flat, Gradients
from densebench.execution.shared_statistics import MeanAndVar
from densebench.kernels.bn_relu import bn_relu
from densebench.kernels.bn_relu_backward import bn_relu_backward
from densebench.kernels.bn_relu_conv3x3 import bn_relu_conv3x3
from densebench.kernels.bn_relu_conv3x3_backward import bn_relu_conv3x3_backward
from densebench.kernels.convolutions import library
from densebench.kernels.norm import Norm
from densebench.kernels.rows import as_rows

# By the number of sides of an image: with larger ones a tile consists of what surrounds it, and the forward takes
# twice the library's time and more (14 x 14 pixels at 8, 8 x 8 x 8 at 4).
LARGEST_DILATION = {2: 4, 3: 2}


class NormConvolution(NamedTuple):
    """relu(norm(x)) of rows x [M, C], M = N H W pixels, through the 3x3 convolution of a unit.

    Attributes:
        pixels: which the rows are.
        scratch: holds what goes through memory.
    """

    pixels: Pixels
    scratch: Scratch

    def takes(self, unit: ConvUnit, weight: Tensor, *rows: Tensor) -> bool:
        """Whether `forward_into` and `backward` work in one pass.

        The kernels have one dilation for all sides, and padding that keeps the size.
        """
        first, *others = *unit.options.dilation, *unit.options.padding
        if first > LARGEST_DILATION[len(unit.options.dilation)] or any(other != first for other in others):
            return False
        return library(weight, *rows) is not None

    def forward_into(
        self, unit: ConvUnit, x: Tensor, norm: Norm, weight: Tensor, out: Tensor, statistics: MeanAndVar | None
    ) -> None:
        """Into `out` [M, k], with mean and variance [k] of what is written."""
        mean, var = statistics or (None, None)
        bn_relu_conv3x3(x, self.pixels.size, unit.options.dilation[0], *norm, weight, out, mean, var)

    def forward(self, unit: ConvUnit, x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
        """As a map [N, k, H, W] of its own."""
        return convolve(self.pixels.map(self.operand(x, norm)), unit.options, weight)

    def operand(self, x: Tensor, norm: Norm) -> Tensor:
        """relu(norm(x)) [M, C], in scratch."""
        a = self.scratch.rows("activation", x)
        bn_relu(x, *norm, a)
        return a

    def backward(
        self, unit: ConvUnit, grad: Tensor, x: Tensor, norm: Norm, parameters: Flat, needs: Flat, needs_x: bool
    ) -> tuple[Tensor, Gradients]:
        """From the gradient [M, k] to that of x, which nothing else reads (if needed), and the parameters'."""
        needs_a = needs_x or any(unit.affine(needs))
        weight = unit.weight(parameters)
        if not self.takes(unit, weight, grad, x):
            grad_x, gradients = self.backward_to_operand(unit, grad, self.operand(x, norm), weight, needs, needs_a)
            self.scratch.free("activation")  # of the size of x; what follows has workspaces of its own
            sums = bn_relu_backward(grad_x, x, *norm, unit.call.by_batch) if needs_a else ()
        else:
            grad_x = self.scratch.rows("gradient", x) if needs_a else grad
            *sums, grad_weight = bn_relu_conv3x3_backward(
                grad, x, self.pixels.size, unit.options.dilation[0], *norm, unit.call.by_batch, weight,
                grad_x if needs_a else None, unit.weight(needs),
            )  # fmt: skip
            gradients = unit.weight_gradient(needs, grad_weight)
        return grad_x, gradients | (unit.affine_gradients(needs, *sums) if needs_a else {})

    def backward_to_operand(
        self, unit: ConvUnit, grad: Tensor, a: Tensor, weight: Tensor, needs: Flat, needs_a: bool
    ) -> tuple[Tensor, Gradients]:
        """Through the convolution alone: the gradient of its operand (if needed) and of its weight."""
        maps = (self.pixels.map(grad), self.pixels.map(a))
        grad_a, grad_weight = convolution_backward(*maps, unit.options, weight, needs_a, unit.weight(needs))
        return (as_rows(grad_a) if needs_a else grad), unit.weight_gradient(needs, grad_weight)
