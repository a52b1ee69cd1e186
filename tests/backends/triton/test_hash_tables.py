"""The tables that the Triton kernels read of hash rounds."""

from dataclasses import replace

import pytest
import torch

from attnzoo.conformance.cases import AttentionCase
from attnzoo.spec.hashed import HashedChunks, HashRound

pytest.importorskip("triton", reason="the package triton is not installed")
from attnzoo.backends.triton.hash_tables import hash_tables

ATTENTION = AttentionCase(pattern=HashedChunks(5), kv_heads=2, batch=2).attention()


def test_chunks_start_where_the_sorted_queries_and_keys_say():
    for index, table in hash_tables(ATTENTION).items():
        current = ATTENTION.segments[index].pattern.rounds[-1]
        by_query = current.query_chunks().gather(2, current.queries)
        for chunk in range(ATTENTION.segments[index].kv_len + 1):
            assert torch.equal(table.starts[:, chunk], (current.chunks < chunk).sum(-1).int())
            assert torch.equal(table.query_starts(current.queries)[..., chunk], (by_query < chunk).sum(-1).int())


def test_segments_share_the_chunks_of_their_rounds():
    first, second = hash_tables(ATTENTION).values()
    assert first.query_chunks is second.query_chunks and first.key_chunks is second.key_chunks
    assert sorted((first.earlier, second.earlier)) == [0, 1]
    for number, hash_round in enumerate(ATTENTION.segments[1].pattern.rounds):
        assert torch.equal(first.query_chunks[..., number], hash_round.query_chunks().int())
        assert torch.equal(first.key_chunks[..., number], hash_round.key_chunks().int())


def test_rounds_that_no_longer_segment_has_get_tables_without_sharing():
    """The kernels must not read the chunks of another round, whatever rounds a pattern has."""
    first, second = ATTENTION.segments
    copy = HashRound(**vars(first.pattern.rounds[0]))
    changed = replace(first, pattern=replace(first.pattern, rounds=(copy,)))
    tables = hash_tables(replace(ATTENTION, segments=(changed, second)))
    assert tables[0].rounds == 1 and tables[1].rounds == 2
