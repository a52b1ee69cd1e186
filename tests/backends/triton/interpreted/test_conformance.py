"""The conformance kit on the Triton kernels: some cases in every run of the tests, all of them in a long run."""

import pytest
import torch

import attnzoo
from attnzoo.conformance.cases import AttentionCase, cases
from attnzoo.conformance.kit import run_case
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from tests.backends.triton.interpreted.conftest import IS_LONG

DTYPES = (torch.float32, torch.float16)
HALF = torch.float16

# Each pattern, mask, bias and shape occurs at least once.
SMALL = [
    AttentionCase(pattern=Causal(), mask="keys", kv_heads=2, q_len=5, kv_len=23),
    AttentionCase(pattern=Window(5, 3), mask="globals", bias="none", batch=1),
    AttentionCase(pattern=Window(5, 3), bias="trained relative", batch=1),
    AttentionCase(pattern=Window(35, 3), bias="trained dense", batch=1),  # one pair of a tile is hidden
    AttentionCase(pattern=Chunks(5, 2, 0, causal=True), batch=1),
    AttentionCase(pattern=SortedChunks(8, 1, 0, causal=True), batch=1, q_len=20, kv_len=20),
    AttentionCase(pattern=HashedChunks(5, 1, 0, causal=True), kv_heads=2, batch=1, q_len=33, kv_len=33),
]
LARGE = [
    AttentionCase(pattern=Full(), mask="keys"),
    AttentionCase(pattern=Full(), mask="queries", bias="trained dense", batch=1),
    AttentionCase(pattern=Full(), bias="trained dense", other_shapes=True, batch=2),
    AttentionCase(pattern=Window(5, 3), bias="trained relative", other_shapes=True, kv_heads=2, q_len=5, kv_len=23),
    AttentionCase(pattern=Causal(), mask="dense", empty=True, batch=2),
    AttentionCase(pattern=Causal(), mask="globals", kv_heads=1, q_len=23, kv_len=9, grad=False),
    AttentionCase(pattern=Window(5, 3), mask="keys", uneven=True, batch=1),
    AttentionCase(pattern=Window(5, 3), mask="globals", strided=True, grad=False, batch=1),
    AttentionCase(pattern=Chunks(8, 1, 1), mask="keys", bias="trained relative", batch=1),
    AttentionCase(pattern=SortedChunks(5, 1, 1), mask="keys", batch=1, q_len=20, kv_len=20),
    AttentionCase(pattern=HashedChunks(4, 1, 1, min_distance=2), mask="keys", kv_heads=1, q_len=5, kv_len=23, batch=2),
    AttentionCase(pattern=HashedChunks(5), mask="dense", uneven=True, batch=1),
    AttentionCase(HALF, pattern=Window(5, 3), mask="globals", batch=1),
    AttentionCase(HALF, pattern=Window(5, 3), bias="trained relative", batch=1),
    AttentionCase(HALF, pattern=SortedChunks(8, 1, 0, causal=True), batch=1, q_len=20, kv_len=20),
    AttentionCase(pattern=Window(5, 3), mask="globals", dropout=0.25, batch=1),
    AttentionCase(pattern=Causal(), bias="trained relative", softcap=True, batch=1),
    AttentionCase(pattern=Chunks(8, 1, 1), mask="dense", bias="trained dense", softcap=True, batch=1),
    AttentionCase(HALF, pattern=Window(5, 3), mask="globals", grad=False, softcap=True, batch=1),
    AttentionCase(pattern=Full(), transform="grad", batch=1),
]


def run(case):
    return run_case(attnzoo.configure("triton"), case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases_that_have_many_tiles(small_tiles, case):
    outcome = run(case)
    assert not outcome.failure and not outcome.refused


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_cases_that_have_one_tile(large_tiles, case):
    outcome = run(case)
    assert not outcome.failure
    assert outcome.refused == bool(case.transform)


@pytest.mark.parametrize("case", cases(DTYPES) if IS_LONG else [], ids=str)
def test_every_case(case):
    assert not run(case).failure
