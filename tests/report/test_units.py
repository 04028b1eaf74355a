"""Cases and machines in words."""

from __future__ import annotations

import pytest

from densebench.records import Case
from densebench.report.units import condition_words, device_words
from tests.report.records import make_case


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Intel(R) Xeon(R) Processor @ 2.80GHz, family 6 model 106 (2 threads)",
            "Intel Xeon 2.80 GHz, family 6 model 106 (2 threads)",
        ),
        ("Intel(R) Core(TM) i7-1185G7 CPU @ 3.00GHz", "Intel Core i7-1185G7 3.00 GHz"),
        ("AMD EPYC 7B13 64-Core Processor (8 threads)", "AMD EPYC 7B13 64-Core (8 threads)"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("cpu", "cpu"),
    ],
)
def test_a_device_is_named_without_trademarks(name: str, words: str) -> None:
    assert device_words(name) == words


def _named(options: dict[str, object]) -> str:
    case: Case = make_case("naive", options=options)
    return condition_words(case).split(", batch")[0].removeprefix("DenseNet-121")


def test_options_of_networks_are_in_words() -> None:
    assert _named({}) == ""
    assert _named({"in_channels": 1, "spatial_dims": 3}) == " (3-D, 1 channel)"
    assert _named({"in_channels": 4, "depth": 40}) == " (4 channels, depth=40)"
