"""Whether a kernel computes with another tile what it should."""

from __future__ import annotations

from benchmarks.kernel_calls import Results, ours
from benchmarks.kernel_facts import OPERATORS
from benchmarks.kernel_runs import Subject
from benchmarks.tile_candidates import Candidate
from densebench.kernels.tiling import changing

STRAYS = 0.1  # of a row's size: a tile may round otherwise, not forget a row


class Trial:
    """One operator on one shape, by which tiles are judged: against float64, and row by row against the chosen."""

    def __init__(self, kernel: str, subject: Subject) -> None:
        self.kernel, self.subject = kernel, subject
        self._chosen: Results | None = None

    def fault(self, tile: Candidate | None) -> str | None:
        """What is wrong with a tile (None: the chosen one, which comes first); None if nothing is."""
        (call,) = ours(self.subject.operator, self.subject.fresh(1))
        if not OPERATORS[self.subject.operator].is_gradient:  # what is not written must not be right by chance
            for result in call.results().values():
                result.fill_(float("nan"))
        if tile is None:
            call.run()
        else:
            with changing(self.kernel, tile):
                call.run()
        results = call.results()
        wrong = self.subject.judge(results).wrong
        if wrong is None and tile is None:
            self._chosen = results
        return wrong or _stray(results, self._chosen or results)


def _stray(results: Results, chosen: Results) -> str | None:
    """The norm over all of a map says little of one row of it."""
    for name, value in results.items():
        other = chosen[name].double().reshape(-1, value.shape[-1])
        apart = (value.double().reshape(other.shape) - other).norm(dim=1).max()
        if not apart <= STRAYS * other.norm(dim=1).mean():
            return f"a row of {name} is {float(apart):.1e} from what the chosen tile computes"
    return None
