"""What each profile measures."""

from __future__ import annotations

import pytest

from benchmarks.cases import DEPTHS
from benchmarks.profiles import Profile, profile
from benchmarks.suite import short_name
from densebench.contenders import get_contender
from densebench.registry import list_strategies
from densebench.workload import model_options

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


def test_what_would_run_as_naive_does_is_left_out() -> None:
    """Without a graph nothing is recomputed or offloaded; on a CPU everything is in host memory already."""
    chosen = {where: profile("full", where) for where in ("cpu", "cuda")}
    timed = {(where, mode): contenders_of(chosen[where], mode) for where in chosen for mode in ("train", "infer")}
    assert {at for at, names in timed.items() if "offloaded" in names} == {("cuda", "train")}
    assert {at for at, names in timed.items() if "checkpointed_blocks" in names} == {
        ("cpu", "train"),
        ("cuda", "train"),
    }


def test_slow_peers_are_not_in_the_quick_run() -> None:
    slow = {"monai", "checkpointed_blocks"}
    for device in ("cpu", "cuda"):
        assert slow.isdisjoint(contenders_of(profile("quick", device), "train"))
        assert slow <= contenders_of(profile("default", device), "train")
        assert slow <= contenders_of(profile("full", device), "train")


@pytest.mark.parametrize(("where", "batch"), [("cpu", 4), ("cuda", 64)])
def test_what_compiles_is_measured_once_and_last(where: str, batch: int) -> None:
    """Beside naive and fused of its own turns; the case is another than theirs elsewhere, the network the same."""
    for name in ("quick", "default", "full"):
        groups = profile(name, where).groups
        compiling = [g for g in groups if any(get_contender(c.strategy).compiles for c in g.cases)]
        assert compiling == ([groups[-1]] if name == "full" else [])
    cases = profile("full", where).groups[-1].cases
    assert [case.strategy for case in cases] == ["naive", "fused", "compiled", "compiled_budget"]
    assert {(c.model, c.mode, c.batch, c.autocast) for c in cases} == {
        ("densenet121", "train", batch, "bfloat16" if where == "cuda" else None)
    }
    assert all(model_options(case) == {} for case in cases)


def test_naive_runs_in_both_formats_on_a_gpu() -> None:
    for group in profile("full", "cuda").groups:
        if not group.timed or group.cases[0].batch < 64 or any(c.cuda_graph for c in group.cases):
            continue
        formats = [case.memory_format for case in group.cases if case.strategy == "naive"]
        beside = bool(group.cases[0].options)
        assert formats == (["channels_last"] if beside else ["channels_last", "contiguous"]), group.name


def test_names_of_tests_tell_the_formats_apart() -> None:
    for device in ("cpu", "cuda"):
        for group in profile("full", device).groups:
            names = [short_name(case) for case in group.cases]
            assert len(set(names)) == len(names), group.name
