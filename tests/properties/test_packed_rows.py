"""Each document of a packed row has the same output as alone, on every backend that supports dense masks."""

from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import given, note

from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment


@st.composite
def rows(draw):
    """``(batch, length)``: the document of each token; -1 is padding, also between documents."""
    length = draw(st.integers(1, 40))
    documents = []
    for _ in range(draw(st.integers(1, 3))):
        row, number = [], 0
        while len(row) < length:
            count = draw(st.integers(1, 20))
            padding = draw(st.sampled_from([False, False, False, True]))
            row += [-1 if padding else number] * count
            number += 1
        documents.append(row[:length])
    return torch.tensor(documents)


@st.composite
def backends(draw):
    kind = draw(st.sampled_from(["eager", "sdpa", "blocked-local", "blocked-local", "lsh", "lsh"]))
    if kind == "blocked-local":
        window, sinks = draw(st.integers(2, 12)), draw(st.integers(0, 6))
        return registry.make_backend(kind, window=window, sinks=sinks, inner=draw(st.sampled_from(["eager", "sdpa"])))
    if kind == "lsh":
        options = dict(num_hashes=draw(st.integers(1, 3)), chunk_length=draw(st.integers(1, 8)))
        buckets = draw(st.sampled_from([1, 2, 4, 8]))
        return registry.make_backend(
            kind, **options, num_buckets=buckets, inner=draw(st.sampled_from(["eager", "sdpa"]))
        )
    return registry.make_backend(kind)


@given(st.data())
def test_each_document_has_the_same_output_as_alone(data):
    documents, backend, causal = data.draw(rows()), data.draw(backends()), data.draw(st.booleans())
    note(backend)
    batch, length = documents.shape
    kv_heads, dim = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 4, 8]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def normal(heads):
        return torch.randn((batch, heads, length, dim), generator=random, dtype=torch.float64)

    query, key, value = normal(4), normal(kv_heads), normal(kv_heads)
    mask = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    mask = (mask & torch.ones(length, length, dtype=torch.bool).tril() if causal else mask)[:, None]
    packed = Attention(query, (Segment(key, value, mask=mask),), 0.5)
    output = backend.run(packed).output
    assert not output.transpose(1, 2)[documents < 0].any()
    pattern = Causal() if causal else Full()
    for sample, row in enumerate(documents.tolist()):
        for number in sorted(set(row) - {-1}):
            start, count = row.index(number), row.count(number)
            place = (slice(sample, sample + 1), slice(None), slice(start, start + count))
            alone = replace(packed, query=query[place], segments=(Segment(key[place], value[place], pattern),))
            expected = backend.run(alone).output
            torch.testing.assert_close(output[place], expected, rtol=0, atol=1e-12, msg=f"{sample}, {start}, {count}")
