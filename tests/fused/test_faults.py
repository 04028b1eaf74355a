"""Faults seeded into the fused path, one at a time: each is noticed by the check named for it.

They are the ways in which fused batch norms and shared buffers have been wrong in published code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from densebench.kernels import bn_relu_pool, compiled, rows
from tests.fused.checks import CHECKS
from tests.fused.seeding import C, Fault, seeded

NORM, TILES, VECTORS = "execution.batch_norm", "kernels.rows", "kernels.norm"
PASSES, PRODUCTS, CONVOLUTIONS = (f"kernels/{name}.c" for name in ("passes", "products", "convolutions"))
POOLS = "kernels/pools.c"
ROWS, BLOCKS, MAPS = (f"kernels/{name}.h" for name in ("rows", "blocks", "tiles"))
FUSED, STAGE, GRADIENT = "strategies.fused", "execution.fused_stage", "execution.feature_gradient"
POOLING = "execution.pooling"
PRODUCT = "FeatureGradient.through_product"
FAULTS = [
    # What the statistics do to the gradient
    Fault("statistics detached", PASSES, "norm_gradients", "(double)norm[2 * columns + c] / rows", "0",
          "training"),
    Fault("statistics detached, uncompiled", VECTORS, "norm_gradients", "norm.scale / rows", "norm.scale * 0",
          "training", uncompiled=True),
    Fault("only the last reader's terms", "kernels.deferred", "defer", "pending += terms", "pending.copy_(terms)",
          "training"),
    Fault("mean's term missing", PASSES, "norm_gradients", "(share * dz)", "0", "training"),
    Fault("mean's term missing, uncompiled", VECTORS, "norm_gradients", "(beta, gamma", "(0 * beta, gamma",
          "training", uncompiled=True),
    Fault("variance's term missing", PASSES, "norm_gradients", "(share * grad_gamma * inv_std)", "0", "training"),
    Fault("one thread's gradients left out", PASSES, "norm_gradients", "thread < threads", "thread < 1",
          "several_threads"),
    Fault("one thread's statistics left out", PASSES, "statistics", "thread < threads", "thread < 1",
          "several_threads"),
    Fault("eps in xhat forgotten", VECTORS, "norm_gradients", "sum_dz_x * norm.inv_std",
          "sum_dz_x * norm.inv_std / (1 - 1e-5 * norm.inv_std ** 2) ** 0.5", "training", uncompiled=True),
    Fault("norm2 as if in evaluation", "kernels.bn_relu_backward", "_cpu_backward", "if by_batch else",
          "if False else", "uneven_dilation"),
    Fault("training's backward in evaluation", GRADIENT, PRODUCT, "unit.call.by_batch", "True",
          "mixed_modes"),
    # Running statistics
    Fault("momentum swapped", NORM, "commit_observed", "(running, unbiased, momentum)",
          "(running, unbiased, 1 - momentum)", "several_steps"),
    Fault("biased running variance", NORM, "commit_observed", "one.values / (one.values - 1)", "1.0", "training"),
    Fault("counted twice", NORM, "_count_batch", "(counters, 1)", "(counters, 2)", "training"),
    Fault("moved twice", STAGE, "FusedStage.commit", "self.observed)", "self.observed * 2)", "training"),
    Fault("cumulative average one behind", NORM, "call_norm", "num_batches_tracked + 1", "num_batches_tracked + 2",
          "cumulative_average"),
    # The norm itself
    Fault("absolute gamma", PASSES, "fold", "(gamma ? gamma[c] : 1)", "fabs(gamma ? gamma[c] : 1)", "training"),
    Fault("absolute gamma, uncompiled", VECTORS, "_fold", "inv_std * gamma", "inv_std * gamma.abs()",
          "training", uncompiled=True),
    Fault("beta missing", PASSES, "fold", "beta ? beta[c] : 0", "0", "evaluation"),
    Fault("eps outside the root", PASSES, "fold", "sqrt(var[c] + eps)", "(sqrt(var[c]) + eps)", "evaluation"),
    Fault("eps outside the root, uncompiled", VECTORS, "_fold",
          "(norm.var.to(norm.mean.dtype) + norm.eps).rsqrt_()", "1 / (norm.var.sqrt() + norm.eps)", "evaluation",
          uncompiled=True),
    Fault("NaN swallowed", ROWS, "relu", "z <= 0 ? 0 : z", "z > 0 ? z : 0", "nan"),
    Fault("NaN swallowed, uncompiled", "kernels.passes", "relu_norm", "out=target).relu_()",
          "out=target).relu_().nan_to_num_(0)", "nan", uncompiled=True),
    # Tiles and slices
    Fault("last tile dropped", TILES, "row_slices", "range(0, x.shape[0], step)",
          "range(0, max(1, x.shape[0] - step), step)", "evaluation", uncompiled=True),
    Fault("pivot forgotten", PASSES, "statistics", "pivot[c] + value", "value", "training"),
    Fault("pivot forgotten, uncompiled", VECTORS, "store_statistics", "difference + pivot", "difference",
          "training", uncompiled=True),
    Fault("mean of squares as variance", PASSES, "statistics", "- value * value", "", "training"),
    Fault("mean of squares as variance, uncompiled", VECTORS, "store_statistics",
          "squares.sub_(difference.square_())", "squares", "training", uncompiled=True),
    Fault("pivot not finite", PASSES, "pivot", "mean[c] - mean[c] == 0 ? mean[c] : 0", "mean[c]", "infinity"),
    Fault("pivot not finite, uncompiled", VECTORS, "pivot_of", ".nan_to_num_(0, 0, 0)", "", "infinity",
          uncompiled=True),
    Fault("last row dropped", ROWS, "own_rows", "rows * (thread + 1)", "(rows - 1) * (thread + 1)",
          "evaluation"),
    Fault("last image dropped", "kernels.bn_relu_pool", "image_tiles", "range(0, x.shape[0], step)",
          "range(0, max(1, x.shape[0] - 1), step)", "training", uncompiled=True),
    Fault("statistics of the channels before", "execution.shared_statistics", "SharedStatistics.take_and_store",
          "self.places(channels)", "self.places(slice(0, new.shape[1]))", "dropout"),
    Fault("overwrites the other readers, in C", PASSES, "pass_back", "accumulates ? loaded(grad_x[c])",
          "accumulates ? 0", "plain_layers"),
    Fault("overwrites the other readers, in whole blocks", BLOCKS, "pass_rows", "if (to.accumulates)", "if (0)",
          "wide"),
    Fault("overwrites the other readers, in products", BLOCKS, "pass", "to.accumulates ? grad_x[c]",
          "to.accumulates ? 0", "training"),
    Fault("mean not subtracted in whole blocks", BLOCKS, "pass_rows", "(x - mean)", "x", "wide"),
    Fault("mean not subtracted in products", BLOCKS, "pass", "(x[c] - to.mean[c])", "x[c]", "training"),
    Fault("ReLU passes everything back in whole blocks", BLOCKS, "rectified", "<= 0", "<= -1", "wide"),
    Fault("one thread's weight gradient left out", BLOCKS, "add_up_block", "thread < threads", "thread < 1",
          "several_threads"),
    Fault("columns beyond the last block", PRODUCTS, "pack_transposed", "outputs - first", "outputs - first - 1",
          "training"),
    Fault("statistics of whole blocks not about the pivot", BLOCKS, "finish_rows",
          " - widened(to.pivot + c + d * PART)", "", "wide"),
    Fault("squares left about a block's first row", BLOCKS, "finish_rows", " + apart * (own + moved)", "", "wide"),
    Fault("statistics not about the pivot", BLOCKS, "finish", "(double)y - (double)to.pivot[c]", "(double)y",
          "training"),
    Fault("next norm's ReLU left out of whole blocks", BLOCKS, "finish_rows", "y = rectified(y, y)", "y = y",
          "inference"),
    Fault("next norm's ReLU left out", BLOCKS, "finish", "relu(y * to.scale[c] + to.shift[c])",
          "y * to.scale[c] + to.shift[c]", "inference"),
    Fault("gradient of the weight from the last tile alone", BLOCKS, "add_weight_gradient", "+= sum", "= sum",
          "several_threads"),
    Fault("overwrites the other readers, uncompiled", "kernels.passes", "relu_norm_backward",
          "target.addcmul_(dz, norm.scale) if accumulate else", "None if accumulate else", "training",
          uncompiled=True),
    Fault("pending terms left out", PASSES, "settle", "* slope[c]", "* 0", "training"),
    Fault("only one term in place", PASSES, "relu_norm_backward_in_place", "constant[c] + ", "",
          "uneven_dilation"),
    Fault("stale scratch in backward", "execution.norm_convolution", "NormConvolution.operand",
          "bn_relu(x, *norm, a)", "pass", "plain_layers"),
    # The 3x3 and 3x3x3 convolutions
    Fault("no zeros beside a line", MAPS, "lay_out_plane", "inside ? maps.reach : maps.line",
          "inside ? 0 : maps.line", "training"),
    Fault("a line above the image", MAPS, "lay_out_plane", "strip.row + line >= 0", "1", "training"),
    Fault("what lies beyond the last line", MAPS, "lay_out_plane", "(SIDE - 1) * maps.reach", "maps.reach",
          "training"),
    Fault("no holes in a line", MAPS, "to_tap", "tap % SIDE * maps->reach", "tap % SIDE", "dilated"),
    Fault("no holes in the depth", MAPS, "to_plane", "* maps.reach", "", "dilated_volumes"),
    Fault("a slice of the next volume", MAPS, "strip_at", "line / maps.height % maps.depth", "line / maps.height",
          "volumes"),
    Fault("taps of a slice that is not there", CONVOLUTIONS, "pass_to_input", "panel += strip.first",
          "panel += 0 * strip.first", "volumes"),
    Fault("filter not turned around", CONVOLUTIONS, "pack_columns", "(maps.taps - 1 - tap)", "tap", "training"),
    Fault("pixels at their strip's beginning", CONVOLUTIONS, "finish_at", "strip.before + run.pixel",
          "strip.before", "training"),
    Fault("filter gradients of all taps at the first", CONVOLUTIONS, "add_up", "+ tap * apart[2]", "", "training"),
    Fault("its norm as if in evaluation", "kernels.bn_relu_conv3x3_backward", "_cpu", "if by_batch and",
          "if False and", "training"),
    Fault("overwrites the other readers", GRADIENT, PRODUCT, "self._accumulates", "False",
          "training"),
    Fault("other readers overwritten, plain", GRADIENT, "FeatureGradient.through_norm", "self._accumulates",
          "False", "plain_layers"),
    # Masks
    Fault("ReLU passes everything back", ROWS, "relu_backward", "<= 0", "<= -1", "training"),
    Fault("ReLU passes everything back, uncompiled", "kernels.passes", "_masked", "(grad, z, 0,", "(grad, z, -1,",
          "training", uncompiled=True),
    Fault("dropout not in backward", STAGE, "FusedStage.layer_backward", "new.mul_(as_rows(mask))", "pass",
          "dropout"),
    Fault("dropout redrawn", STAGE, "FusedStage.layer_backward", "as_rows(mask)", "as_rows(mask).flip(0)",
          "dropout"),
    # Who gets what
    Fault("no gradient of weights", "execution.plan", "ConvUnit.weight_gradient",
          "if not self.weight(needs)", "if True", "training"),
    Fault("trained norms get none", "execution.plan", "NormUnit.affine_gradients", "if needed", "if not needed",
          "frozen"),
    Fault("epilogue left out", "kernels.bn_relu_conv1x1", "_by_tiles", "if following is not None", "if False",
          "inference", uncompiled=True),
    Fault("pooled by three", "kernels.bn_relu_pool", "_cpu_avg", "F.avg_pool2d(a, 2)",
          "F.avg_pool2d(a, 2, divisor_override=3)", "evaluation", uncompiled=True),
    Fault("incoming gradient as the buffer", GRADIENT, "FeatureGradient.start_with",
          "self.pixels.grid(self.buffer)[...] = grad.movedim(1, -1)",
          "self.buffer = grad.movedim(1, -1).flatten(0, 2)", "incoming_gradient"),
    # Pools
    Fault("last of equal pixels", POOLS, "largest_of_pixels", "(z > best)", "(z >= best)", "pools"),
    Fault("a window's pixels beyond the edge", POOLS, "largest_of_pixels", "outside[place] ? ", "0 ? ", "pools"),
    Fault("windows one pixel off", POOLS, "pass_lines", "1 + column % 2", "column % 2", "training"),
    Fault("only one of two windows", POOLS, "gather", "windows == 2", "0", "training"),
    Fault("the windows below left out", POOLS, "pass_largest", "if (lines > 2)", "if (0)", "training"),
    Fault("places of another image", POOLS, "relu_norm_largest_backward", "|| row == 0", "", "training"),
    Fault("one of two pixels counted", POOLS, "pass_mean", "if (pixels == 2)", "if (0)", "training"),
    Fault("gradient of a line in no mean", POOLS, "relu_norm_mean_backward", "inside && whole", "whole", "pools"),
    Fault("a thread's first windows not chosen", POOLS, "relu_norm_largest_backward", "at == own.first || ", "",
          "several_threads"),
    Fault("a stem's slope left out", POOLS, "pass_largest", "constant[c] + (x[c] - mean[c]) * slope[c]",
          "constant[c]", "training"),
    Fault("a stem's terms left out", POOLS, "pass_largest", "if (constant)", "if (0)", "training"),
    # Volumes: pooling through the depth
    Fault("the plane before left out", POOLING, "Pooling.largest", "largest.shape[1] - 1", "0", "volumes"),
    Fault("last of equal planes", POOLING, "_takes_over", "value > earlier", "value >= earlier",
          "pools_of_volumes"),
    Fault("NaN takes nothing over", POOLING, "_takes_over", ".logical_or_(value.isnan())", "", "pools_of_volumes"),
    Fault("two planes get one gradient", POOLING, "_to_the_largest", "shared.masked_fill_(~kept, 0)", "pass",
          "volumes"),
    Fault("sum of planes as mean", POOLING, "Pooling.mean", ".mul_(0.5)", "", "volumes"),
    Fault("gradient of a plane in no mean", POOLING, "Pooling.mean_backward", "even[:, -1].zero_()", "pass",
          "volumes"),
    # The same in Triton's kernels
    Fault("triton: columns beyond the last", "kernels.bn_relu_conv1x1", "_kernel",
          "tl.where(kept[None, :], a, 0.0)", "a", "triton_values"),
    Fault("triton: last row dropped", "kernels.bn_relu_conv1x1_backward", "_kernel",
          "tl.minimum(first + rows_a_program, rows)", "tl.minimum(first + rows_a_program, rows - 1)",
          "triton_values"),
    Fault("triton: others overwritten", "kernels.bn_relu_conv1x1_backward", "_kernel",
          "value = before.to(dtype) + (", "value = 0 * before.to(dtype) + (", "triton_values"),
    Fault("triton: rows beyond the last count", "kernels.bn_relu_conv1x1_backward", "_kernel",
          "a = tl.where(mask, a, 0.0)", "pass", "triton_float16_range"),
    Fault("triton: nothing settled", "kernels.bn_relu_conv1x1_backward", "_kernel",
          "constant[None, :] + centered * slope[None, :]", "constant[None, :]", "triton_values"),
    Fault("triton: half of the rows summed", "kernels.bn_relu_conv1x1_backward", "_kernel",
          "sum_dz_x += upper + lower", "sum_dz_x += upper", "triton_values"),
    Fault("triton: rows beyond the last counted", "kernels.bn_relu_conv1x1", "count_in",
          "tl.where(mask, x - mean, 0.0)", "x - mean", "triton_values"),
    Fault("triton: one row too many counted", "kernels.bn_relu_conv1x1", "_kernel", "left > 8", "left > 7",
          "triton_values"),
    Fault("triton: rows of the last tile", "kernels.bn_relu_conv1x1", "_kernel", "(upper_row + 8 < rest)",
          "(upper_row < rest)", "triton_values"),
    Fault("triton: between threads forgotten", "kernels.channel_statistics", "merge_rows",
          "squares + between * between * counts", "squares", "triton_values"),
    Fault("triton: a value's share", "kernels.bn_relu_conv1x1", "count_in", "(count + 1)", "(count + 2)",
          "triton_values"),
    Fault("triton: sum instead of mean", "kernels.deferred", "_terms_kernel", "scale * grad_beta / rows",
          "scale * grad_beta", "triton_values"),
    Fault("triton: between parts forgotten", "kernels.channel_statistics", "_merge_statistics_kernel",
          "squares + between * between * counts", "squares", "triton_values"),
    Fault("triton: pivot forgotten", "kernels.channel_statistics", "_merge_statistics_kernel",
          "mean += tl.load(pivot_pointer + column, mask=kept, other=0.0).to(dtype)", "pass", "triton_values"),
    Fault("triton: last of equal maxima", "kernels.bn_relu_pool", "largest_of_window", "(a > best)", "(a >= best)",
          "triton_pools"),
    Fault("triton: window one pixel off", "kernels.bn_relu_pool_backward", "_gradient_of_largest",
          "row - 2 * window_row + 1", "row - 2 * window_row", "triton_pools"),
    Fault("triton: NaN swallowed", "kernels.bn_relu", "_kernel",
          "a = relu((x.to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :])",
          "z = (x.to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :]; a = tl.where(z > 0, z, 0.0)",
          "triton_nan"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch of a few rows, so that small networks are worked through in many tiles; fresh memory is NaN, so that
    nobody finds the right values of the last run in it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(rows, "TILE_BYTES", 2048)
    monkeypatch.setattr(bn_relu_pool, "TILE_BYTES", 2048)


@pytest.mark.parametrize("folder", [compiled.FOLDER, None], ids=["compiled", "uncompiled"])
@pytest.mark.parametrize("name", CHECKS)
def test_right_code_passes(name: str, folder: Path | None) -> None:
    with compiled.using(folder):
        CHECKS[name]()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace(" ", "_") for fault in FAULTS])
def test_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    if fault.module.endswith(C) and compiled.library(torch.float64) is None:
        pytest.skip(f"nothing is compiled here: {compiled.description()}")
    with seeded(fault, tmp_path), pytest.raises(AssertionError):
        CHECKS[fault.check]()


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 22
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
