"""Other people's packages, which may be missing or broken: torchvision, timm and MONAI."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch


@functools.cache
def why_not_importable(package: str) -> str | None:
    """What keeps a package from being imported here, with the remedy where there is one; None if nothing does."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install 'densebench[peers]'"
    try:
        import_peer(package)
    except Exception as error:  # there, but broken
        return f"{package} cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


@functools.cache
def import_peer(package: str) -> Any:
    """A peer's package, also beside a CPU-only torch.

    torchvision's Python code registers shape rules for two operators of its compiled library; where that
    library does not load, importing needs at least their schemas. timm and MONAI import torchvision.
    """
    if package == "monai":
        import_peer("torchvision") if importlib.util.find_spec("torchvision") else None
        importlib.import_module("monai.networks.nets.densenet")
    elif package == "timm":
        import_peer("torchvision")
    elif package == "torchvision":
        try:
            return importlib.import_module(package)
        except RuntimeError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept_libraries.append(library)
    return importlib.import_module(package)


_kept_libraries: list[torch.library.Library] = []  # a collected library takes its schemas with it
