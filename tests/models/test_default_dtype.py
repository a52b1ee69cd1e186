"""Patched models give what they give, whatever dtype torch makes tensors in by default.

Libraries set it around a model to load it. Positions, blocks and buckets are integers, and must not be made of it.
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
LENGTH = 300  # sums of 1 / 4 are rounded in bfloat16 from the 256th token on


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    lsh._rotations.cache_clear()
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        lsh._rotations.cache_clear()


@pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=zoo.FAMILIES)
def test_a_patched_model_does_not_depend_on_the_default_dtype(family):
    model, inputs = family.build(), family.inputs(LENGTH, "left")
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        torch.manual_seed(0)
        expected = logits_of(model, inputs)
        for dtype in DTYPES:
            torch.manual_seed(0)
            with default(dtype):
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
def test_a_backend_does_not_depend_on_the_default_dtype(name, dtype):
    backend = registry.make_backend(name, **BACKENDS[name])
    if isinstance(backend, ApproximateBackend):
        backend = type(backend)(**BACKENDS[name], inner="eager")
    for case in CASES:
        whole = case.attention()
        expected = backend.run(whole).output
        with default(dtype):
            assert torch.equal(backend.run(whole).output, expected), case
