"""A dense block written out anew, in plain arithmetic, with every step a method that a fault can replace.

It shares no code with the strategies: `test_equivalence.py` accepts it as it stands and in variants that only
order their sums differently, and `faults.py` breaks it in the ways that strategies have been broken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densebench.models import DenseLayer, Stage


class Rewritten:
    """Callable as a strategy; one instance lives as long as the strategy is registered."""

    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        features = [stage.run_head(x)]
        for layer in stage.layers:
            features.append(self.layer(layer, features))
        return stage.run_tail(self.concatenate(features))

    def layer(self, layer: DenseLayer, features: list[Tensor]) -> Tensor:
        new = self.unit(layer.norm1, layer.conv1, self.concatenate(features))
        if layer.bottleneck:
            new = self.unit(layer.norm2, layer.conv2, new)
        return self.dropout(new, layer.drop_rate) if layer.drop_rate > 0 and layer.training else new

    def unit(self, norm: nn.BatchNorm2d, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return self.convolve(conv, self.relu(self.normalize(norm, x)))

    def concatenate(self, features: list[Tensor]) -> Tensor:
        return torch.cat(features, 1)

    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        return F.conv2d(a, conv.weight, None, 1, conv.padding, conv.dilation)

    def relu(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def dropout(self, new: Tensor, rate: float) -> Tensor:
        return F.dropout(new, rate)

    def normalize(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # of a half precision map too
        return self.normalize_wide(norm, x.to(wide)).to(x.dtype)

    def normalize_wide(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if self.by_batch(norm):
            mean, var = self.statistics(x)
            if norm.training and norm.track_running_stats:
                self.count(norm)
                self.move(norm, mean.detach(), var.detach(), x.numel() // x.shape[1])
        else:
            mean, var = norm.running_mean, norm.running_var
        return self.affine(norm, x - column(mean), self.inverse_deviation(norm, var))

    def by_batch(self, norm: nn.BatchNorm2d) -> bool:
        return norm.training or norm.running_mean is None

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)

    def inverse_deviation(self, norm: nn.BatchNorm2d, var: Tensor) -> Tensor:
        return (var + norm.eps).rsqrt()

    def affine(self, norm: nn.BatchNorm2d, centered: Tensor, inverse: Tensor) -> Tensor:
        normalized = centered * column(inverse)
        return normalized * column(norm.weight) + column(norm.bias)

    def count(self, norm: nn.BatchNorm2d) -> None:
        norm.num_batches_tracked += 1

    def momentum(self, norm: nn.BatchNorm2d) -> float:
        return 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum

    def move(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
        norm.running_mean.lerp_(mean, self.momentum(norm))
        norm.running_var.lerp_(var * (count / (count - 1)), self.momentum(norm))


class Reordered(Rewritten):
    """Sums in another order: images last first, statistics by parts, the affine map folded."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each image's mean and variance, merged by Chan's formula from the last image to the first."""
        means, squares = x.mean((2, 3)).flip(0), x.var((2, 3), unbiased=False).flip(0)
        mean = means.mean(0)
        return mean, squares.mean(0) + (means - mean).square().mean(0)

    def affine(self, norm: nn.BatchNorm2d, centered: Tensor, inverse: Tensor) -> Tensor:
        return torch.addcmul(column(norm.bias), centered, column(inverse * norm.weight))


class ByMatrixProduct(Rewritten):
    """Convolutions as matrix products over unfolded images: other sums of the same terms."""

    def convolve(self, conv: nn.Conv2d, a: Tensor) -> Tensor:
        columns = F.unfold(a, conv.kernel_size, conv.dilation, conv.padding)
        return (conv.weight.flatten(1) @ columns).unflatten(2, a.shape[2:])


class OneBuffer(Rewritten):
    """Features written into one preallocated buffer, slice by slice."""

    def concatenate(self, features: list[Tensor]) -> Tensor:
        first, width = features[0], sum(f.shape[1] for f in features)
        buffer = first.new_empty(first.shape[0], width, *first.shape[2:])
        start = 0
        for feature in features:
            buffer[:, start : start + feature.shape[1]] = feature
            start += feature.shape[1]
        return buffer


RIGHT = {"rewritten": Rewritten, "reordered": Reordered, "by_product": ByMatrixProduct, "one_buffer": OneBuffer}


def column(values: Tensor) -> Tensor:
    """[C] as [1, C, 1, 1]."""
    return values[None, :, None, None]
