"""Comparisons of tensors: by a tolerance, or under the error rule."""

from attnzoo.conformance.error_rule import check, factor


def is_close(got, expected, tolerance=1e-4):
    """Whether the largest difference is less than ``tolerance`` times the largest expected value."""
    return bool((got - expected).abs().max() < tolerance * expected.abs().max())


def assert_obeys_the_error_rule(what, got, reference, plain, k=None, dtype=None, plain_dtype=None):
    """Assert that a result passes the error rule. Without ``k``, its name ``what`` selects forward or gradient."""
    verdict = check(what, got, reference, plain, factor(what) if k is None else k, dtype, plain_dtype)
    assert verdict.ok, str(verdict)
