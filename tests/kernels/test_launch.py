"""How work is shared out among programs, for devices that are not here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from densebench.kernels import bn_relu_conv1x1_backward
from densebench.kernels.compiled import FOLDER
from densebench.kernels.launch import H100, Device, compiling_for, loadable
from densebench.kernels.library import require_dense_rows
from densebench.kernels.rows import as_rows
from densebench.kernels.tiling import cdiv, parts_tile, share

BLOCKS = ((6, 64, 56), (12, 128, 28), (24, 256, 14), (16, 512, 7))  # layers, first channels, side


@pytest.mark.parametrize("gpu", [H100, Device(108, (8, 0))], ids=["H100", "A100"])
@pytest.mark.parametrize("images", [8, 64, 256])
def test_no_program_of_the_heaviest_kernel_waits_for_another(images: int, gpu: Device) -> None:
    """In every layer of DenseNet-121: its registers take a multiprocessor whole, so one more is a second wave."""
    with compiling_for(gpu):
        for layers, start, side in BLOCKS:
            for layer in range(layers):
                x = torch.empty(images * side * side, start + 32 * layer, dtype=torch.bfloat16, device="meta")
                tile = bn_relu_conv1x1_backward._tile(x, 128)
                programs = bn_relu_conv1x1_backward._shared(x, tile).parts * cdiv(x.shape[1], tile.columns)
                assert programs <= gpu.multiprocessors


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("programs", [0, 1, 3, 7])
def test_shares_cover_all_rows_in_whole_tiles(rows: int, programs: int) -> None:
    shared = share(rows, 16, programs)
    assert shared.rows % 16 == 0
    assert (shared.parts - 1) * shared.rows < rows <= shared.parts * shared.rows
    assert shared.parts <= max(1, programs)


def test_too_many_partial_results_are_refused() -> None:
    assert parts_tile(4096).rows == 4096
    with pytest.raises(ValueError, match="4097 partial results"):
        parts_tile(4097)


def test_rows_are_dense_whatever_the_layout() -> None:
    """One image is channels-last and contiguous at once; a view of it would have its pixels side by side."""
    for images in (1, 2):
        x = torch.arange(images * 3 * 4 * 5.0).view(images, 3, 4, 5)
        for layout in (torch.contiguous_format, torch.channels_last):
            rows = as_rows(x.contiguous(memory_format=layout))
            assert rows.stride() == (3, 1)
            assert torch.equal(rows.view(images, 4, 5, 3).permute(0, 3, 1, 2), x)


def test_channels_that_lie_apart_are_refused() -> None:
    require_dense_rows("bn_relu", (torch.empty(4, 6)[:, 1:5], torch.empty(6), None, 1e-5))
    with pytest.raises(ValueError, match=r"densebench::bn_relu .* strides \(1, 4\)"):
        require_dense_rows("bn_relu", (torch.empty(6, 4).t(), 1e-5))


def test_what_may_be_loaded_of_a_row() -> None:
    """More than its columns where a wider buffer holds more; rows that share values, or are all one, do not."""
    assert loadable(torch.empty(4, 32)[:, :20]) == 32
    assert loadable(torch.empty(1, 20).expand(4, 20)) == 20


def test_an_amd_gpu_is_no_hopper() -> None:
    """MI200 says 9.0, too, and takes no limit of registers."""
    assert H100.is_hopper
    assert not Device(104, (9, 0), is_amd=True).is_hopper


def test_a_norms_values_that_lie_apart_are_refused() -> None:
    """A parameter may be every other value of another tensor; a kernel would read the first of them all."""
    require_dense_rows("bn_relu", (torch.empty(4, 1).expand(4, 1)[:, 0][:1], torch.empty(0)[::2]))
    with pytest.raises(ValueError, match=r"densebench::bn_relu .* shape \[4\] with strides \(2,\)"):
        require_dense_rows("bn_relu", (torch.empty(4, 6), torch.empty(8)[::2]))


def test_the_folder_is_imported_under_one_name() -> None:
    """Operators can be registered once."""
    spec = importlib.util.spec_from_file_location("kernels", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"import densebench\.kernels, which is this folder, instead of kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
