"""Patched models do not depend on torch's default dtype, which libraries set while they load a model.

Positions, blocks and buckets are integers: they must not be computed in the default dtype.
"""

import contextlib

import pytest
import torch

import attnzoo
from attnzoo.backends.approximate import lsh
from attnzoo.backends.approximate.base import ApproximateBackend
from attnzoo.registry import registry
from attnzoo.testing import AttentionCase
from tests.support import models as zoo
from tests.support.judge import logits_of

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
LENGTH = 300  # bfloat16 rounds sums of 1 / 4 from the 256th token on


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    lsh._rotations.cache_clear()
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        lsh._rotations.cache_clear()


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=zoo.FAMILIES)
def test_patched_model_does_not_depend_on_the_default_dtype(family):
    model, inputs = family.build(), family.inputs(LENGTH, "left")
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        torch.manual_seed(0)
        expected = logits_of(model, inputs)
        for dtype in DTYPES:
            torch.manual_seed(0)
            with default_dtype(dtype):
                assert torch.equal(logits_of(model, inputs), expected), dtype


BACKENDS = {
    "eager": {},
    "sdpa": {},
    "blocked-local": dict(window=4, sinks=2),
    "lsh": dict(num_hashes=2, chunk_length=8, num_buckets=4),
}
CASES = [
    *(
        AttentionCase(pattern=pattern, mask=mask)
        for pattern in (attnzoo.Causal(), attnzoo.Full())
        for mask in ("keys", "dense")
    ),
    *(AttentionCase(pattern=attnzoo.Window(5, 3), mask=mask, bias="trained relative") for mask in ("none", "keys")),
    AttentionCase(pattern=attnzoo.Chunks(8), mask="keys"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_does_not_depend_on_the_default_dtype(name, dtype):
    backend = registry.make_backend(name, **BACKENDS[name])
    if isinstance(backend, ApproximateBackend):
        backend = type(backend)(**BACKENDS[name], inner="eager")
    for case in CASES:
        attention = case.attention()
        expected = backend.run(attention).output
        with default_dtype(dtype):
            assert torch.equal(backend.run(attention).output, expected), case
