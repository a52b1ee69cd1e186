"""Mutants that compute the same as the original, each with the reason. ``make mutants`` does not count them."""

from __future__ import annotations

from tests.mutants.mutations import Mutant

# (path, line before, line after): reason. The lines have no indentation.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "attnzoo/tuning/race.py",
        "cotangent = torch.ones(shape, dtype=attention.query.dtype, device=attention.query.device)",
        "cotangent = torch.ones(shape, device=attention.query.device)",
    ): "autograd converts the gradient of an output to the dtype of the output",
    (
        "attnzoo/spec/patterns.py",
        "return min(q_len, max(64, min(256, (self.left + self.right) // 16)))",
        "return min(q_len, max(65, min(256, (self.left + self.right) // 16)))",
    ): "the number of queries in a block changes the speed, and no result",
}


def reason_for_equivalence(mutant: Mutant) -> str | None:
    """Return why a mutant is equivalent to the original, or None if it is not known to be."""
    return EQUIVALENT.get((mutant.path, mutant.before, mutant.after))
