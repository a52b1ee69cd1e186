"""Run a program on an unpatched model, on a patched model, and on the oracle. Compare the results by the error rule.

A program is a function ``program(model, patch)``. It calls ``patch(model)`` where a user would call ``attnzoo.patch``,
and returns its results as ``{name: tensor}``. In the unpatched run, ``patch`` does nothing.
"""

from __future__ import annotations

from collections import Counter

import torch

import attnzoo
from attnzoo.conformance.error_rule import GRADIENT
from tests.support.compare import assert_obeys_the_error_rule


def run(build, program, backend=None, dtype=torch.float32, **options):
    """Return the results of a program, and the handles of its patches. No ``backend`` means no patch."""
    handles = []

    def patch(model):
        if backend is not None:
            handles.append(attnzoo.patch(model, backend, **options))

    torch.manual_seed(0)
    return program(build().to(dtype), patch), handles


def assert_runs_as_unpatched(build, program, calls, backend="sdpa", k=GRADIENT, dtype=torch.float32):
    """Assert that a program computes the same with a patch as without, under the error rule.

    Args:
        build: returns a new model in float32. The oracle is the same model in float64 with the backend ``eager``.
        program: the program.
        calls: how many kernels each site runs: a number, or a dict from the names of the modules' classes.
        backend: the backend of the patched run.
        k: the factor of the error rule. The results of a training step depend on gradients.
        dtype: the dtype of the unpatched and the patched run. LSH attention hashes differently in each dtype, so its
            runs are comparable with the oracle only in float64.
    """
    oracle, _ = run(build, program, "eager", torch.float64)
    original, _ = run(build, program, dtype=dtype)
    before = Counter(attnzoo.stats())
    patched, handles = run(build, program, backend, dtype)
    [handle] = handles
    assert oracle.keys() == original.keys() == patched.keys()
    for what, reference in oracle.items():
        if reference.is_floating_point():
            assert_obeys_the_error_rule(what, patched[what], reference, original[what], k, dtype)
        else:
            assert torch.equal(patched[what], original[what]) and torch.equal(reference, original[what]), what
    counts = {site.name: site.calls for site in handle.sites}
    expected = {site.name: calls[site.cls] if isinstance(calls, dict) else calls for site in handle.sites}
    assert counts == expected
    assert Counter(attnzoo.stats()) - before == {backend: sum(counts.values())}, "every call ran on the backend"


def weights_of(model):
    """All weights of a model in float64, before a program changes them."""
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def updates_of(model, before):
    """The changes of all trained weights since :func:`weights_of`, in one tensor."""
    after = {name: parameter for name, parameter in weights_of(model).items() if name in before}
    assert after.keys() == before.keys()
    return torch.cat([(after[name] - before[name]).flatten() for name in before])
