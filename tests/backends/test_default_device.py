"""Backends create tensors on the attention's device, whatever the default device is."""

import pytest
import torch

import attnzoo
from attnzoo.backends.common.block_lists import BlockShape, block_lists
from attnzoo.conformance.attention_check import check_attention
from attnzoo.registry import registry
from attnzoo.spec.hashed import HashedChunks
from attnzoo.testing import AttentionCase

CASES = {
    "window": AttentionCase(pattern=attnzoo.Window(5, 3), mask="keys", bias="trained relative"),
    "globals": AttentionCase(pattern=attnzoo.Window(5, 3), mask="globals"),
    "hashed": AttentionCase(pattern=HashedChunks(5)),
    "causal": AttentionCase(pattern=attnzoo.Causal(), mask="keys"),
}
LSH = {"num_hashes": 2, "chunk_length": 8, "num_buckets": 4}


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        *((case, "sdpa", {}) for case in CASES),
        ("causal", "lsh", LSH),
        ("causal", "blocked-local", {"window": 4, "sinks": 2}),
    ],
)
def test_a_check_passes_with_another_default_device(case, name, options):
    whole, backend = CASES[case].attention(), registry.make_backend(name, **options)
    with torch.device("meta"):  # no operation can compute there
        report = check_attention("case", whole, backend, grad=True, max_rows=20)
    assert report.ok, report


def test_scratch_memory_is_on_the_cpu():
    """Stacked blocks copy keys to scratch memory if the rows of a head are not contiguous."""
    query, key, value = (torch.randn(1, 600, 2, 8).transpose(1, 2) for _ in range(3))
    whole = attnzoo.Attention(query, (attnzoo.Segment(key, value, attnzoo.Window(32, 32)),), 0.3)
    with torch.device("meta"):
        report = check_attention("case", whole, registry.make_backend("sdpa"), grad=True, max_rows=20)
    assert report.ok, report


def test_math_blocks_work_with_another_default_device():
    whole = AttentionCase(pattern=HashedChunks(5), dropout=0.25).attention()
    with torch.device("meta"):
        assert registry.make_backend("sdpa").run(whole).output.device.type == "cpu"


def test_block_lists_work_with_another_default_device():
    whole = AttentionCase(pattern=attnzoo.Window(7, 1), mask="keys", q_len=143, kv_len=143, grad=False).attention()
    with torch.device("meta"):
        assert all(indices.device.type == "cpu" for indices in block_lists(whole, BlockShape(64, 64)))
