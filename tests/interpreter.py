"""What Triton's interpreter lacks with newer packages around it."""

from __future__ import annotations

from typing import Any


def index_arrays() -> None:
    """Triton 3.6 makes indices of arrays of one element, which NumPy 2.4 refuses; Triton 3.7 squeezes them."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.__version__.startswith("3.6."):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
