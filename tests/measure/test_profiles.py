"""What each profile measures."""

from __future__ import annotations

import pytest

from benchmarks.cases import DEPTHS, Profile, profile
from densebench.registry import list_strategies

ALL = [(name, device) for name in ("quick", "default", "full") for device in ("cpu", "cuda")]


def contenders_of(chosen: Profile, mode: str) -> set[str]:
    return {case.strategy for group in chosen.groups if group.timed for case in group.cases if case.mode == mode}


@pytest.mark.parametrize(("name", "where"), ALL)
def test_training_and_inference_of_every_strategy_beside_its_rivals(name: str, where: str) -> None:
    chosen = profile(name, where)
    rivals = {"torchvision", "torchvision_checkpointed", "eager"}
    for mode in ("train", "infer"):
        assert {*list_strategies(), *rivals} <= contenders_of(chosen, mode)
    models = {case.model for group in chosen.groups for case in group.cases if case.strategy == "eager"}
    assert models == {"resnet50"}


@pytest.mark.parametrize(("name", "where"), ALL)
def test_no_case_comes_twice_and_groups_share_a_setting(name: str, where: str) -> None:
    chosen = profile(name, where)
    keys = [case.key() for group in chosen.groups for case in group.cases]
    keys += [case.key() for case in chosen.predicted]
    assert len(keys) == len(set(keys))
    assert len({group.name for group in chosen.groups}) == len(chosen.groups)
    for group in chosen.groups:
        settings = {(c.mode, c.batch, c.input_shape, c.dtype, c.autocast, c.device) for c in group.cases}
        assert len(settings) == 1
        assert {case.device for case in group.cases} == {where}


@pytest.mark.parametrize(("name", "where"), ALL)
def test_memory_against_depth_of_every_strategy(name: str, where: str) -> None:
    """Three depths at least: two do not show an exponent."""
    chosen = profile(name, where)
    cases = [case for group in chosen.groups for case in group.cases if case.kind == "depth"]
    cases += [case for case in chosen.predicted if case.kind == "depth"]
    for strategy in list_strategies():
        mine = [case.options for case in cases if case.strategy == strategy]
        depths = {options["block_config"][0] for options in mine if "block_config" in options}
        quick = (name, where) == ("quick", "cpu")
        assert set(DEPTHS[:3] if quick else DEPTHS) <= depths


@pytest.mark.parametrize("name", ["quick", "default", "full"])
def test_on_a_cpu_the_full_size_table_is_predicted(name: str) -> None:
    full = [c for c in profile(name, "cpu").predicted if c.kind == "step" and c.input_shape == (3, 224, 224)]
    shown = {case.strategy for case in full if case.batch == 8}
    assert {*list_strategies(), "torchvision", "torchvision_checkpointed", "eager"} <= shown
    assert {case.source for case in full} == {"predicted"}


def test_slow_peers_are_not_in_the_quick_run() -> None:
    slow = {"compiled", "compiled_budget", "monai", "checkpointed_blocks"}
    for device in ("cpu", "cuda"):
        assert slow.isdisjoint(contenders_of(profile("quick", device), "train"))
        assert slow <= contenders_of(profile("default", device), "train")
        assert slow <= contenders_of(profile("full", device), "train")
