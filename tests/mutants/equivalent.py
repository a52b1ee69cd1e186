"""Mutants that compute the same as the original, each with the reason. ``make mutants`` does not count them."""

from __future__ import annotations

from tests.mutants.mutations import Mutant

# (path, line before, line after): reason. The lines have no indentation.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


def reason_for_equivalence(mutant: Mutant) -> str | None:
    """Return why a mutant is equivalent to the original, or None if it is not known to be."""
    return EQUIVALENT.get((mutant.path, mutant.before, mutant.after))
