"""Strategies with one fault each: in convolutions, ReLU, dropout, buffers, and before autograd.

Registered in `faults.FAULTS` by being imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densebench.models import DenseLayer, Stage
from tests.faults import fault
from tests.rewritten import Rewritten

# Buffers and slices


@fault("training", "")
class SlicesInTheWrongOrder(Rewritten):
    def concatenate(self, features: list[Tensor]) -> Tensor:
        return torch.cat([features[0], *features[:0:-1]], 1)


@fault("two steps", "step 2")
class StaleBufferOfThePreviousForward(Rewritten):
    def __init__(self) -> None:
        self.buffer: dict[torch.Size, Tensor] = {}

    def concatenate(self, features: list[Tensor]) -> Tensor:
        whole = torch.cat(features, 1)
        stale = self.buffer.setdefault(whole.shape, whole.detach().clone())
        rows = torch.arange(whole.shape[0], device=whole.device) == whole.shape[0] - 1
        return torch.where(rows[:, None, None, None], stale, whole)


@fault("training", "")
class LastImageDropped(Rewritten):
    def layer(self, layer: DenseLayer, features: list[Tensor]) -> Tensor:
        new = super().layer(layer, features)
        return torch.cat((new[:-1], torch.zeros_like(new[-1:])))


@fault("training", "")
class LastRowOfPixelsNotComputed(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        new = super().convolve(conv, a)
        return torch.cat((new[..., :-1, :], torch.zeros_like(new[..., -1:, :])), 2)


@fault("block alone", "^input")
class InputWritten(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        output = super().__call__(stage, x.clone())
        x.data.relu_()
        return output


# Convolution and ReLU


@fault("training", "")
class PaddingIsNotZero(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        pad = conv.padding[0]
        return F.conv2d(F.pad(a, (pad,) * 4, value=1e-3), conv.weight, None, 1, 0, conv.dilation)


@fault("dilated", "")
class DilationIgnored(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        return F.conv2d(a, conv.weight, None, 1, conv.kernel_size[0] // 2)


@fault("training", "")
class KernelMirrored(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        return F.conv2d(a, conv.weight.flip(2, 3), None, 1, conv.padding, conv.dilation)


@fault("float32", "")
class OperandsRounded(Rewritten):
    """To 11 bits, as TF32 does."""

    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        rounded = conv.weight + (conv.weight.half().to(a.dtype) - conv.weight).detach()
        return F.conv2d(a, rounded, None, 1, conv.padding, conv.dilation)


@fault("NaN", "")
class NanSwallowed(Rewritten):
    def relu(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0.0)


class _Rectified(torch.autograd.Function):
    """ReLU with a mask of one's own choice in backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return torch.relu(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.mask, grad, 0.0), None


@fault("NaN", "gradient")
class MaskShutAtNan(Rewritten):
    def relu(self, z: Tensor) -> Tensor:
        return _Rectified.apply(z, z > 0)


@fault("zero weights", "gradient")
class MaskOpenAtZero(Rewritten):
    def relu(self, z: Tensor) -> Tensor:
        return _Rectified.apply(z, z >= 0)


@fault("training", "gradient")
class SavedTensorOverwritten(Rewritten):
    """One scratch for all masks; written so that autograd does not notice, as a kernel writes."""

    def __init__(self) -> None:
        self.scratch = torch.empty(0, dtype=torch.bool)

    def relu(self, z: Tensor) -> Tensor:
        if self.scratch.numel() < z.numel():
            self.scratch = z.new_empty(100 * z.numel(), dtype=torch.bool)
        mask = self.scratch[: z.numel()].view(z.shape)
        mask.data.copy_(z > 0)
        return _Rectified.apply(z, mask)


# Dropout


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, new: Tensor, rate: float) -> Tensor:
        ctx.rate = rate
        return F.dropout(new, rate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.dropout(grad, ctx.rate), None


@fault("dropout", "gradient")
class DropoutMaskRedrawn(Rewritten):
    def dropout(self, new: Tensor, rate: float) -> Tensor:
        return _Dropped.apply(new, rate)


@fault("dropout", "")
class DropoutNotScaled(Rewritten):
    def dropout(self, new: Tensor, rate: float) -> Tensor:
        return F.dropout(new, rate) * (1 - rate)


@fault("dropout", "")
class MoreRandomNumbersDrawn(Rewritten):
    def dropout(self, new: Tensor, rate: float) -> Tensor:
        torch.rand(1, device=new.device)
        return F.dropout(new, rate)


@fault("evaluation", "")
class DropoutInEvaluation(Rewritten):
    def layer(self, layer: DenseLayer, features: list[Tensor]) -> Tensor:
        new = super().layer(layer, features)
        return new if layer.training else self.dropout(new, layer.drop_rate)


# Autograd


@fault("training", "gradient")
class OnlyTheNextReaderGivesAGradient(Rewritten):
    def layer(self, layer: DenseLayer, features: list[Tensor]) -> Tensor:
        return super().layer(layer, [*(f.detach() for f in features[:-1]), features[-1]])


@fault("training", "gradient")
class GradientOfTheInputDoubled(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        return super().__call__(stage, 2 * x - x.detach())


@fault("training", "missing")
class GradientMissing(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        return F.conv2d(a, conv.weight.detach(), None, 1, conv.padding, conv.dilation)


@fault("training", "gradient")
class GradientOfAWeightWithoutOneImage(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        rest = (None, 1, conv.padding, conv.dilation)
        parts = F.conv2d(a[:-1], conv.weight, *rest), F.conv2d(a[-1:], conv.weight.detach(), *rest)
        return torch.cat(parts)


@fault("frozen", "should not be")
class FrozenParameterGivenAGradient(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        output = super().__call__(stage, x)
        frozen = [p for p in stage.block.parameters() if not p.requires_grad]

        def give(_: Tensor) -> None:
            for parameter in frozen:
                parameter.grad = torch.zeros_like(parameter)

        output.register_hook(give)
        return output


class _Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        kept = grad.clone()
        grad.zero_()
        return kept


@fault("block alone", "gradient of the output")
class GradientOfTheOutputWritten(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        return _Overwrites.apply(super().__call__(stage, x))


# Precision


@fault("block alone", "float32")
class OutputInAnotherDtype(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        return super().__call__(stage, x).float()


@fault("training", "")
class ComputedInFloat32(Rewritten):
    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        return F.conv2d(a.float(), conv.weight.float(), None, 1, conv.padding, conv.dilation).to(a.dtype)


@fault("bfloat16", "float32")
class AutocastIgnored(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().__call__(stage, x.float())
