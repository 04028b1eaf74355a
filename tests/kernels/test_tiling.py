"""Tiles that a search puts in place of those chosen: every kernel takes them, and computes the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tile_candidates import SPACES, Candidate, candidates
from densebench.kernels import bn_relu, bn_relu_conv1x1, bn_relu_conv1x1_backward
from densebench.kernels.launch import H100, compiling_for
from densebench.kernels.tiling import Tile, changing
from tests.kernels.problems import PROBLEMS, Shape
from tests.kernels.values import GATE, relative_error

KERNEL_OF = {operator: kernel for kernel, space in SPACES.items() for operator in space.operators}
KERNEL_OF |= {"bn_relu_backward_into": "bn_relu_backward"}
BY_KERNEL = {
    name: KERNEL_OF[problem(Shape()).operator]
    for name, problem in PROBLEMS.items()
    if problem(Shape()).operator in KERNEL_OF
}
TILES = {
    "one program": lambda chosen: chosen._replace(programs=1),
    "many programs": lambda chosen: chosen._replace(programs=50),
    "short and wide": lambda chosen: chosen._replace(rows=16, columns=64),
    "long and narrow": lambda chosen: chosen._replace(rows=128, columns=16),
}


def test_every_kernel_is_searched() -> None:
    assert set(BY_KERNEL.values()) == set(SPACES)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", BY_KERNEL)
def test_values_do_not_depend_on_the_tile(name: str, tile: str) -> None:
    problem = PROBLEMS[name](Shape(images=3, height=6, width=9, columns=41, outputs=24))
    taken: list[Tile] = []

    def change(chosen: Tile) -> Tile:
        taken.append(TILES[tile](chosen))
        return taken[-1]

    with changing(BY_KERNEL[name], change):
        produced = problem.solve("cuda")
    assert taken, "the kernel chose its tile without asking"
    for quantity, truth in problem.expected.items():
        assert relative_error(produced[quantity], truth) <= GATE[torch.float64], quantity


def test_a_change_ends_with_its_context_and_is_one_kernels() -> None:
    chosen, small = bn_relu._tile(64), Tile(16, 16)
    with changing("bn_relu", lambda _: small):
        assert bn_relu._tile(64) is small
        with changing("bn_relu", lambda tile: tile._replace(warps=8)), changing("deferred", lambda _: chosen):
            assert bn_relu._tile(64) == chosen._replace(warps=8)  # of the chosen one, not of another change
        assert bn_relu._tile(64) is small
    assert bn_relu._tile(64) == chosen


def test_what_is_chosen_is_among_what_is_tried() -> None:
    """Or the space lies beside the point."""
    with compiling_for(H100):
        for rows, columns in ((200_704, 64), (200_704, 192), (200_704, 224), (3136, 992)):
            x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
            forward = bn_relu_conv1x1._tile(x, x.new_empty(128, columns))
            for kernel, chosen in (
                ("bn_relu_conv1x1", forward),
                ("bn_relu_conv1x1_backward", bn_relu_conv1x1_backward._tile(x, 128)),
            ):
                assert chosen in [tried(chosen) for tried in candidates(kernel)], kernel


@pytest.mark.parametrize("kernel", SPACES)
def test_candidates_differ_and_have_limits_that_hold(kernel: str) -> None:
    found = candidates(kernel)
    assert len({candidate.name for candidate in found}) == len(found) >= 8
    for candidate in found:
        tile = candidate(Tile(64, 32, 128))
        assert tile.rows & (tile.rows - 1) == 0
        assert tile.registers is None or 80 <= tile.registers <= 248


def test_values_a_thread_make_rows() -> None:
    assert Candidate(4, values=32)(Tile(1, 64)).rows == 64
    assert Candidate(8, values=8, programs=3)(Tile(1, 32, stages=2)) == Tile(64, 32, 0, 8, 2, None, 3)
