"""Every contender can be built, says what it lacks, and runs the network that it claims to run."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from densebench import contenders, peers
from densebench.contenders import get_contender, list_contenders
from densebench.measure.memory import measure_peak
from densebench.measure.steps import forget_compiled
from densebench.measure.validation import Checks
from densebench.prediction import trace_case
from densebench.registry import list_strategies
from densebench.workload import build_workload
from tests.measure.cases import OPTIONS, small_case

PEERS = [name for name in list_contenders() if get_contender(name).family == "peer"]
PACKAGED = [name for name in PEERS if get_contender(name).needs]
OWN = [name for name in PEERS if not get_contender(name).needs and not get_contender(name).compiles]


@pytest.fixture(autouse=True)
def forget_what_was_importable() -> Iterator[None]:
    yield
    peers.why_not_importable.cache_clear()


def test_strategies_come_first() -> None:
    assert list_contenders()[: len(list_strategies())] == list_strategies()
    assert {"torchvision", "torchvision_checkpointed", "timm", "monai", "compiled", "compiled_budget"} < set(PEERS)


def test_an_unknown_contender_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown contender 'nothing'; known: naive, .*monai"):
        get_contender("nothing")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'timm' is already registered"):
        contenders.contender("timm", summary="again")(lambda model: torch.nn.Identity())


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"name": "y z"}, "'y z' is not an identifier"),
        ({"summary": " "}, "'other' needs a summary"),
        ({"family": "strategyy"}, r"family='strategyy' is not one of \['peer', 'yardstick'\]"),
        ({"family": "strategy"}, "family='strategy' is not one of"),  # those are of the registry
        ({"modes": ("train", "infr")}, "are not some of"),
        ({"devices": ()}, "are not some of"),
        ({"family": "yardstick", "network": "resnet50"}, "needs its network, and reference=None"),
        ({"family": "yardstick", "reference": None}, "needs its network, and reference=None"),
        ({"network": "resnet50"}, "network='resnet50' is for yardsticks only"),
    ],
)
def test_facts_that_would_be_misread_are_refused(facts: dict[str, Any], why: str) -> None:
    before = list_contenders()
    with pytest.raises(ValueError, match=why):
        contenders.contender(**{"name": "other", "summary": "another", **facts})(lambda model: torch.nn.Identity())
    assert list_contenders() == before


def test_a_peer_does_not_hide_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))
    contenders.contender("naive", summary="not ours")(lambda model: torch.nn.Identity())
    with pytest.raises(ValueError, match="'naive' is a strategy and a contender of tests"):
        get_contender("naive")


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.why_not_importable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    needs = get_contender(name).needs
    assert get_contender(name).missing() == f"{needs} is not installed; pip install 'densebench[peers]'"


def test_a_broken_package_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: str) -> Any:
        raise ImportError(f"lib{package}.so: cannot open shared object file\nsecond line")

    peers.why_not_importable.cache_clear()
    monkeypatch.setattr(peers, "import_peer", broken)
    assert get_contender("timm").missing() == (
        "timm cannot be imported: libtimm.so: cannot open shared object file"
    )


@pytest.mark.parametrize("name", ["eager", *OWN])
def test_what_needs_no_package_lacks_nothing(name: str) -> None:
    assert get_contender(name).missing() is None


@pytest.mark.parametrize(
    ("name", "model", "has"),
    [
        ("monai", "densenet264", True),
        ("monai", "densenet161", False),
        ("torchvision", "densenet161", True),
        ("torchvision", "densenet264", False),
        ("naive", "densenet_bc", True),
        ("naive", "resnet50", False),
        ("eager", "resnet50", True),
    ],
)
def test_which_networks_a_contender_has(name: str, model: str, has: bool) -> None:
    assert get_contender(name).has(model) is has


@pytest.mark.parametrize("volumes", [False, True], ids=["images", "volumes"])
@pytest.mark.parametrize("name", OWN)
def test_peers_of_our_own_compute_what_naive_does(name: str, volumes: bool) -> None:
    if volumes and not get_contender(name).volumes:
        pytest.skip(f"{name} takes images only")
    shape = {"input_shape": (3, 8, 8, 8), "options": {**OPTIONS, "spatial_dims": 3}} if volumes else {}
    verdict = Checks().check(small_case(name, dtype="float64", **shape))
    assert verdict is not None
    assert verdict.wrong is None
    assert measure_peak(lambda: build_workload(small_case(name)), torch.device("cpu"), 1).peak_delta_bytes


def test_recomputed_blocks_keep_less() -> None:
    options = {"block_config": [12, 12], "growth_rate": 8, "stem": "cifar", "num_classes": 10}
    naive, blocks = (
        measure_peak(functools.partial(build_workload, small_case(name, options=options)), torch.device("cpu"), 1)
        for name in ("naive", "checkpointed_blocks")
    )
    predicted = trace_case(small_case("checkpointed_blocks", options=options)).activation_bytes
    assert blocks.peak_delta_bytes < 0.8 * naive.peak_delta_bytes
    assert blocks.peak_delta_bytes == pytest.approx(predicted, rel=0.02)


def test_monai_computes_what_naive_does() -> None:
    pytest.importorskip("monai")
    options = {"block_config": [2, 2, 2, 2], "growth_rate": 8}
    case = small_case("monai", model="densenet121", input_shape=(3, 64, 64), dtype="float64", options=options)
    verdict = Checks().check(case)
    assert verdict is not None
    assert verdict.wrong is None


def test_monai_runs_volumes() -> None:
    pytest.importorskip("monai")
    options = {"block_config": [1, 1, 1, 1], "spatial_dims": 3, "growth_rate": 4}
    case = small_case(
        "monai", model="densenet121", input_shape=(3, 32, 32, 32), options=options, memory_format="channels_last"
    )
    assert build_workload(case).step().shape == (4, 1000)


def test_the_memory_budget_holds_while_it_compiles_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config
    from torch._inductor import compile_fx

    seen: list[float] = []

    def compile_nothing(module: Any, inputs: Any) -> Any:
        seen.append(config.activation_memory_budget)
        return module.forward

    before = config.activation_memory_budget
    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing)
    torch._dynamo.reset()
    work = build_workload(small_case("compiled_budget"))
    assert config.activation_memory_budget == before
    work.step()
    torch._dynamo.reset()
    assert set(seen) == {0.5}
    assert config.activation_memory_budget == before


def test_what_compiles_does_so_for_its_shape_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    config = torch._dynamo.config
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **facts: asked.append(facts.get("dynamic")))
    with config.patch(fail_on_recompile_limit_hit=False):
        for name in ("compiled", "compiled_budget"):
            config.fail_on_recompile_limit_hit = False
            get_contender(name).build("densenet_x", **small_case().options)
            assert config.fail_on_recompile_limit_hit
    assert asked == [False, False]


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_too_many_shapes_are_an_error_rather_than_the_plain_network() -> None:
    """As `compiled` is built, with a backend that takes no time; the limit is two shapes."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        contenders._raise_rather_than_fall_back()
        forget_compiled([small_case("compiled")])
        network = Doubled()
        network.compile(backend="eager", dynamic=False)
        for size in (3, 4):
            network(torch.zeros(1, 3, size, size))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            network(torch.zeros(1, 3, 5, 5))
        forget_compiled([small_case("naive")])
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            network(torch.zeros(1, 3, 5, 5))
        forget_compiled([small_case("naive"), small_case("compiled")])
        network(torch.zeros(1, 3, 5, 5))
    torch._dynamo.reset()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["compiled", "compiled_budget"])
def test_compiled_computes_what_naive_does(name: str) -> None:
    verdict = Checks().check(small_case(name))
    assert verdict is not None
    assert verdict.wrong is None


@pytest.mark.nightly
@pytest.mark.parametrize("name", PACKAGED)
def test_packages_compute_what_naive_does(name: str) -> None:
    """Whole networks; torchvision's checkpoints count each batch twice in its buffers, and are told."""
    pytest.importorskip(str(get_contender(name).needs))
    case = small_case(name, model="densenet121", batch=2, input_shape=(3, 96, 96), dtype="float64", options={})
    verdict = Checks().check(case)
    assert verdict is not None
    if name == "torchvision_checkpointed":
        assert verdict.wrong is not None
        assert verdict.wrong.startswith("buffers")
    else:
        assert verdict.wrong is None
