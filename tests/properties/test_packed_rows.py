"""Documents of a packed row do not affect each other, on every backend that supports dense masks."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, note

from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Full, SortedChunks
from attnzoo.spec.segments import Attention, Segment
from tests.support.documents import packed_rows
from tests.support.drawn_attentions import EVERYTHING, attentions
from tests.support.small_blocks import block_sizes


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


@given(st.data(), st.booleans())
def test_each_document_has_the_same_output_as_alone(data, are_small):
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
    with block_sizes(are_small):
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


@st.composite
def packed_attentions(draw, kinds=("one", "wrap-around", "sorted", "hashed")):
    """Draw an attention of any pattern, and the document of each token. The mask hides keys of other documents."""
    capabilities = replace(EVERYTHING, dtypes=frozenset({torch.float64}), mask=False, bias=frozenset())
    attention = draw(attentions(capabilities, kinds=kinds, equal_lengths=True))
    lengths = draw(packed_rows(attention.batch, attention.q_len))
    numbers = [[number for number, count in enumerate(row) for _ in range(abs(count))] for row in lengths]
    documents, segments = torch.tensor(numbers), []
    for segment in attention.segments:
        of_keys = documents[:, None]
        if isinstance(segment.pattern, SortedChunks):  # the keys of each head have another order
            of_keys = of_keys.expand(-1, attention.heads, -1).gather(2, segment.pattern.token.clamp(min=0))
        segments.append(replace(segment, mask=documents[:, None, :, None] == of_keys[:, :, None]))
    return replace(attention, segments=tuple(segments)), documents


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(packed=packed_attentions(), number=st.integers(0, 3), are_small=st.booleans())
def test_a_document_does_not_depend_on_other_documents(backend, packed, number, are_small):
    attention, documents = packed
    changed = documents == documents.max() - number  # one document of each sample, or none

    def change(segment):
        """Return the segment with other keys and values of the changed documents."""
        is_changed = changed[:, None]
        if isinstance(segment.pattern, SortedChunks):
            token = segment.pattern.token[:, :: attention.heads // segment.key.shape[1]]
            is_changed = is_changed.expand(-1, token.shape[1], -1).gather(2, token.clamp(min=0))
        is_changed = is_changed[..., None]
        key, value = segment.key.detach(), segment.value.detach()
        return replace(segment, key=torch.where(is_changed, -7 * key, key), value=torch.where(is_changed, 9.0, value))

    other = replace(attention, segments=tuple(map(change, attention.segments)))
    with block_sizes(are_small):
        outputs = [registry.make_backend(backend).run(which).output.transpose(1, 2) for which in (attention, other)]
    torch.testing.assert_close(outputs[0][~changed], outputs[1][~changed], rtol=0, atol=1e-12)
