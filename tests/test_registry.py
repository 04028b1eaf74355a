"""Strategies by name: how one is found, declared and refused; a new file is all that a new one takes."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import densebench
from densebench import UnsupportedError, get_strategy, list_strategies, set_strategy, strategy
from densebench.registry import Strategy, those_with
from tests.comparison import buffers
from tests.networks import images, lone_block, small, temporary_strategy

TOY = """
from densebench.models.stage import Stage
from densebench.registry import strategy


@strategy("toy", summary="naive by another name")
def toy(stage: Stage, x):
    return stage.run_tail(stage.run_block(stage.run_head(x)))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of the project with one more file in the folder of strategies."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("densebench", "benchmarks", "tests"):
        shutil.copytree(repository / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", root)
    (root / "densebench/strategies/toy.py").write_text(TOY)
    return root


def _python(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_new_file_is_found(tree: Path) -> None:
    """By the registry, as a contender, and in the cases of every profile of the benchmarks."""
    lines = _python(
        tree,
        "-c",
        "import densebench\n"
        "from densebench.contenders import list_contenders\n"
        "from benchmarks.profiles import profile\n"
        "print(densebench.__file__)\n"
        "print(*densebench.list_strategies())\n"
        "print(*list_contenders())\n"
        "for name, device in (('quick', 'cpu'), ('default', 'cpu'), ('default', 'cuda')):\n"
        "    groups = profile(name, device).groups\n"
        "    print(*sorted({case.strategy for group in groups for case in group.cases}))\n",
    ).splitlines()
    assert Path(lines[0]).is_relative_to(tree)
    assert lines[1].split() == ["naive", *sorted([*list_strategies()[1:], "toy"])]
    assert all("toy" in line.split() for line in lines[2:])
    assert len(lines) == 6


def test_new_file_is_tested_and_measured(tree: Path) -> None:
    """No test and no benchmark is edited: what is said of every strategy holds for it, benchmarks collect it."""
    files = ("equivalence", "bad_input", "tensor_kinds", "failure_modes_framework")
    selected = "toy and (not test_equivalence or four_blocks or odd or dropout) and not (test_36 or 35_no_map)"
    paths = [f"tests/test_{file}.py" for file in files]
    tested = _python(tree, "-m", "pytest", *paths, "-k", selected, "-p", "no:cacheprovider", "-v")
    assert all(f"{path}::" in tested for path in paths)
    assert " passed" in tested
    assert "failed" not in tested
    collected = _python(
        tree, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-k", "toy", "-p", "no:cacheprovider"
    )
    assert collected.count("toy") >= 3


def test_import_error_of_a_strategy_is_shown_every_time(tree: Path) -> None:
    """A half-imported folder would list some strategies, in silence, from the second call on."""
    broken = tree / "densebench/strategies/zz_broken.py"
    broken.write_text("import a_package_that_does_not_exist\n")
    try:
        printed = _python(
            tree,
            "-c",
            "from densebench import list_strategies\n"
            "for attempt in range(2):\n"
            "    try:\n"
            "        print(list_strategies())\n"
            "    except ModuleNotFoundError as error:\n"
            "        print(error)\n",
        )
    finally:
        broken.unlink()
    assert printed.splitlines() == ["No module named 'a_package_that_does_not_exist'"] * 2


def test_naive_comes_first_and_the_rest_by_name() -> None:
    names = list_strategies()
    assert names[0] == "naive"
    assert names[1:] == sorted(names[1:])
    assert {"checkpointed", "shared_buffer", "fused"} <= set(names)


def test_every_strategy_says_what_it_is(every_strategy: str) -> None:
    """One line for tables, and a truthful `bypasses`: it decides which hooks are refused."""
    registered = get_strategy(every_strategy)
    assert isinstance(registered, Strategy)
    assert registered.name == every_strategy
    assert registered.summary
    assert "\n" not in registered.summary
    assert registered.function.__module__.startswith("densebench.strategies.")


def test_bypasses_is_true(every_strategy: str) -> None:
    """Modules outside of what a strategy bypasses are called, once each."""
    network = small(every_strategy, stem="imagenet", block_config=(2, 2))
    bypassed = {
        stage.name_of(module)
        for stage in network.features.stages()
        for module in stage.modules(get_strategy(every_strategy).bypasses)
    }
    calls: list[str] = []
    for name, module in network.features.named_modules():
        if name and name not in bypassed:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(images(2, 32))
    expected = {name for name, _ in network.features.named_modules() if name} - bypassed
    assert set(calls) == expected
    assert len(calls) == len(expected), "a module was called twice"


def _function(stage: object, x: object) -> object:
    return x


class _Callable:
    def __call__(self, stage: object, x: object) -> object:
        return x


@pytest.mark.parametrize("nameless", [functools.partial(_function), _Callable()], ids=["partial", "object"])
def test_what_has_no_name_of_its_own_is_refused(nameless: object) -> None:
    """Messages and records say where a strategy comes from: of a partial function that would be `functools`."""
    kind = type(nameless).__name__
    with pytest.raises(TypeError, match=f"'hybrid' is to be a function .* got {kind}; write def hybrid"):
        strategy("hybrid", summary="anything")(nameless)
    assert "hybrid" not in list_strategies()


def test_duplicate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'naive' is already registered by densebench\.strategies\.naive"):
        strategy("naive", summary="another")(_function)
    assert get_strategy("naive").function.__module__ == "densebench.strategies.naive"


@pytest.mark.parametrize("name", ["two words", "", "9lives", "a-b"])
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an identifier; use letters, digits and underscores") as caught:
        strategy(name, summary="anything")
    assert repr(name) in str(caught.value)


def test_bad_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="'empty' needs a summary: one line for the tables"):
        strategy("empty", summary="  ")
    with pytest.raises(ValueError, match="bypasses='everything' is not 'nothing', 'block' or 'stage'"):
        strategy("greedy", summary="anything", bypasses="everything")
    with pytest.raises(ValueError, match="derivatives='second' is not 'first', 'autograd' or 'all'"):
        strategy("smooth", summary="anything", derivatives="second")
    assert not {"empty", "greedy", "smooth"} & set(list_strategies())


@pytest.mark.parametrize("name", ["fast", "Naive", "", None, ["naive"]])
def test_unknown_name_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="unknown strategy") as caught:
        get_strategy(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in list_strategies())


def test_strategy_that_lacks_something_is_listed_and_refused() -> None:
    """Known by name everywhere, so that tables can say why it has no figures; never run."""
    lack = "needs a flux capacitor; install one"
    network = small()
    with temporary_strategy("future", _function, missing=lambda: lack) as name:
        assert name in list_strategies()
        with pytest.raises(UnsupportedError, match=f"'future' cannot run denseblock1: {lack}"):
            set_strategy(network, name)
        assert network.strategy == "naive"
        with pytest.raises(UnsupportedError, match=lack):
            densebench.densenet_x((1, 1), strategy=name)
    assert "future" not in list_strategies()


def test_requirement_lost_later_is_refused_at_the_forward() -> None:
    """Loaded on a machine without what the strategy needs: a sentence, nothing moved, no fallback."""
    lacks: list[str] = []
    with temporary_strategy("volatile", _function, missing=lambda: lacks[0] if lacks else None) as name:
        network = small(name)
        lacks.append("the device is gone")
        before = buffers(network)
        with pytest.raises(UnsupportedError, match="'volatile' cannot run denseblock1: the device is gone"):
            network(images())
        assert all((value == before[key]).all() for key, value in buffers(network).items())


def test_objection_to_one_stage_changes_no_network() -> None:
    """Either every network in a model is switched or none is."""
    networks = densebench.models.nn.ModuleList([small(), small(bn_size=None)])
    objection = "has no bottleneck"
    facts = {"objection": lambda stage: None if stage.layers[0].bottleneck else objection}
    with (
        temporary_strategy("picky", _function, **facts) as name,
        pytest.raises(UnsupportedError, match=f"'picky' cannot run denseblock1: {objection}"),
    ):
        set_strategy(networks, name)
    assert [network.strategy for network in networks] == ["naive", "naive"]


def test_messages_name_the_strategies_that_have_certain_derivatives() -> None:
    """Also one that has been added; each level of derivatives includes those before it."""
    able = {level: those_with(level) for level in ("first", "autograd", "all")}
    assert "'naive'" in able["all"]
    assert "'checkpointed'" in able["autograd"]
    assert "'checkpointed'" not in able["all"]
    assert all(repr(name) in able["first"] for name in list_strategies())
    with temporary_strategy("zz", _function, derivatives="autograd"):
        assert those_with("all") == able["all"]
        assert those_with("autograd").endswith(" and 'zz'")
        with pytest.raises(
            NotImplementedError, match=r"torch\.vmap works with strategies 'naive', .* and 'zz' only"
        ):
            torch.vmap(small("shared_buffer").eval())(images()[:, None])


def _without_tail(stage: Any, x: Any) -> Any:
    return stage.run_block(stage.run_head(x))


@pytest.mark.parametrize("bypasses", ["nothing", "block", "stage"])
@pytest.mark.parametrize("training", [True, False])
def test_a_strategy_that_forgets_a_part_is_named(bypasses: str, training: bool) -> None:
    """And the stage: the norm of the next would only say how many channels it has."""
    with temporary_strategy("hasty", _without_tail, bypasses=bypasses) as name:
        message = "'hasty' returned 16 channels from denseblock1, whose stage has 8: .*stage.run_tail"
        network = small(name).train(training)
        before = buffers(network)
        with pytest.raises(RuntimeError, match=message):
            network(images())
        changed = {key for key, value in buffers(network).items() if not torch.equal(value, before[key])}
        assert not any("denseblock2" in key for key in changed)
    message = "'lazy' returned 5 channels from denseblock1, whose stage has 17"
    with (
        temporary_strategy("lazy", lambda stage, x: x, bypasses=bypasses) as name,
        pytest.raises(RuntimeError, match=message),
    ):
        lone_block(name).train(training)(images(channels=5))


@pytest.mark.parametrize("bypasses", ["block", "stage"])
def test_a_strategy_that_calls_the_block_it_runs_is_refused(bypasses: str) -> None:
    """Each call would be run by the strategy again. The network is not spoilt by it."""
    function = lambda stage, x: stage.run_tail(stage.block(stage.run_head(x)))  # noqa: E731
    with temporary_strategy("circular", function, bypasses=bypasses) as name:
        network = small(name)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"'circular' calls DenseBlock.*stage\.run_block\(x\)"
            ) as caught:
                network(images())
            assert not isinstance(caught.value, RecursionError)
    with temporary_strategy("by_definition", _by_definition, bypasses=bypasses) as name:
        assert torch.equal(set_strategy(network, name).eval()(images()), set_strategy(network, "naive")(images()))


def _by_definition(stage: Any, x: Any) -> Any:
    return stage.run_tail(stage.run_block(stage.run_head(x)))


@pytest.mark.parametrize("bypasses", ["block", "stage"])
def test_parts_that_are_not_standard_are_refused_for_whoever_bypasses_them(bypasses: str) -> None:
    """Without an objection of one's own, and before one's own."""
    network = small()
    network.features.denseblock1.denselayer2.norm1 = nn.GroupNorm(1, 12).double()
    objection = {"objection": lambda stage: "has no luck"}
    with temporary_strategy("around", _by_definition, bypasses=bypasses, **objection) as name:
        with pytest.raises(UnsupportedError, match=r"denselayer2\.norm1 is GroupNorm; .*use 'naive'"):
            set_strategy(network, name)
        with pytest.raises(UnsupportedError, match="denseblock1: has no luck"):
            set_strategy(small(), name)
    with temporary_strategy("through", _by_definition) as name:
        assert set_strategy(network, name)(images()).isfinite().all()
