"""Packed rows under approximate backends: every document gives the same output as alone."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.backends.approximate import visible_keys
from attnzoo.backends.approximate.blocked_local import BlockedLocalBackend
from attnzoo.backends.approximate.lsh import LshBackend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.spec.patterns import Causal, Full
from attnzoo.spec.segments import Attention, Segment
from tests.support import models as zoo
from tests.support.approximate import assert_refused, attention

BACKENDS = {
    "window": BlockedLocalBackend(window=3, inner="sdpa"),
    "sinks": BlockedLocalBackend(window=3, sinks=2, inner="sdpa"),
    "more sinks than a document has": BlockedLocalBackend(window=2, sinks=6, inner="eager"),
    "lsh": LshBackend(num_hashes=2, chunk_length=3, num_buckets=4, inner="sdpa"),
    "lsh, one bucket": LshBackend(num_hashes=1, chunk_length=2, num_buckets=1, inner="eager"),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)

# The document of each of 19 tokens; -1 is padding.
ROWS = (
    [0] * 7 + [1] + [2] * 11,
    [-1] * 3 + [0] * 9 + [1] * 5 + [-1] * 2,
    [0] * 2 + [1] * 2 + [2] * 14 + [-1],
    [-1] * 19,
)
LENGTH = len(ROWS[0])


def numbers(rows=ROWS):
    return torch.tensor(rows)


def grid(documents, causal=True):
    """Return the mask ``(batch, 1, length, length)`` that shows each query its document, causally or not."""
    same = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril() if causal else same)[:, None]


def whole(documents, causal=True, seed=0, **terms):
    """Return an attention over packed rows in float64; ``terms`` are fields of its segment, e.g. another mask."""
    random = torch.Generator().manual_seed(seed)
    shape = (len(documents), 4, documents.shape[1], 8)
    query, key, value = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    segment = Segment(key[:, :2], value[:, :2], **({"mask": grid(documents, causal)} | terms))
    return Attention(query, (segment,), 0.4)


def runs(documents):
    """Yield ``(sample, start, stop)`` of every document."""
    for sample, row in enumerate(documents.tolist()):
        for number in sorted(set(row) - {-1}):
            yield sample, row.index(number), row.index(number) + row.count(number)


def cut(packed, sample, start, stop, pattern):
    """Return the attention of one document alone."""
    (segment,) = packed.segments
    key, value = (tensor[sample : sample + 1, :, start:stop] for tensor in (segment.key, segment.value))
    return Attention(packed.query[sample : sample + 1, :, start:stop], (Segment(key, value, pattern),), packed.scale)


def assert_documents_match_alone(backend, packed, documents, pattern):
    output = backend.run(packed).output
    for sample, start, stop in runs(documents):
        alone = backend.run(cut(packed, sample, start, stop, pattern)).output[0]
        off = float((output[sample, :, start:stop] - alone).abs().max())
        assert off <= 1e-12, f"sample {sample}, tokens {start} to {stop}: {off}"
    assert not output.transpose(1, 2)[documents < 0].any()


# What is computed


@every_backend
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
def test_every_document_gives_the_same_as_alone(backend, causal):
    documents = numbers()
    assert_documents_match_alone(backend, whole(documents, causal), documents, Causal() if causal else Full())


@every_backend
@pytest.mark.parametrize(
    "terms",
    [
        dict(pattern=Causal(), mask=grid(numbers(), causal=False)),
        dict(pattern=Causal(offset=0), mask=grid(numbers())),
        dict(key_mask=numbers() >= 0, mask=grid(numbers() + 1)),
        dict(mask=grid(numbers()).expand(-1, 4, -1, -1)),
    ],
    ids=["a causal pattern", "an offset", "a key mask", "heads"],
)
def test_equivalent_masks_give_the_same(backend, terms):
    assert_documents_match_alone(backend, whole(numbers(), **terms), numbers(), Causal())


@every_backend
def test_a_mask_for_the_whole_batch(backend):
    documents = numbers([ROWS[0]] * 2)
    packed = whole(documents, mask=grid(documents[:1]))
    assert_documents_match_alone(backend, packed, documents, Causal())


@every_backend
@pytest.mark.parametrize("room", [0, 4], ids=["dynamic", "static"])
@pytest.mark.parametrize("new", [1, 6, 13])
def test_new_tokens_on_a_cache_give_the_last_rows(backend, new, room):
    """The new tokens can start in one document and end in another."""
    if isinstance(backend, LshBackend):
        rows = [ROWS[0], [0] * 19]  # new keys change the chunks of a document, so the last document must be new
        rows = rows if new == 13 else [[0] * 13 + [1] * 6] * 2 if new == 6 else [[0] * 8 + [1] * 11] * 2
    else:
        rows = [ROWS[0], [0] * 4 + [1] * 15]
    documents = numbers(rows)
    packed = whole(documents)
    (segment,) = packed.segments
    expected = backend.run(packed).output[:, :, -new:]
    behind = torch.randn(2, 2, room, 8, dtype=torch.float64)
    key, value = (torch.cat([tensor, behind], dim=2) for tensor in (segment.key, segment.value))
    mask = torch.nn.functional.pad(grid(documents)[:, :, -new:], (0, room))
    step = Attention(packed.query[:, :, -new:], (Segment(key, value, mask=mask),), packed.scale)
    torch.testing.assert_close(backend.run(step).output, expected, rtol=0, atol=1e-12)


@every_backend
def test_bias_and_gradient_match_each_document_alone(backend):
    """Only ``eager`` supports a bias on hashed keys."""
    backend, documents = replace(backend, inner="eager"), numbers()
    bias = attention(Full(), None, bias=True, dtype=torch.float64).segments[0].bias
    packed = whole(documents, bias=bias)
    assert check_attention("site", packed, backend, grad=True).ok
    output = backend.run(packed).output
    for sample, start, stop in runs(documents):
        alone = cut(packed, sample, start, stop, Causal())
        alone = replace(alone, segments=(replace(alone.segments[0], bias=bias),))
        torch.testing.assert_close(output[sample, :, start:stop], backend.run(alone).output[0], rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_equal_the_oracle(backend, dtype):
    packed = whole(numbers())
    packed = packed.with_tensors(tuple(tensor.to(dtype) for tensor in packed.tensors()))
    report = check_attention("site", packed, backend, grad=True)
    assert report.ok, str(report)


@every_backend
def test_recall_is_the_mean_recall_of_the_documents(backend):
    documents = numbers()
    packed, rows, total = whole(documents), 0, 0.0
    for sample, start, stop in runs(documents):
        recall = check_attention("site", cut(packed, sample, start, stop, Causal()), backend, grad=False).recall
        rows, total = rows + stop - start, total + recall * (stop - start)
    recall = check_attention("site", packed, backend, grad=False).recall
    assert recall == pytest.approx(total / rows, abs=1e-9) and recall < 1.0


# Masks without documents


def prefix(length, first):
    """Return the mask ``(1, 1, length, length)`` that is causal but shows the first keys to all queries."""
    return (torch.ones(length, length, dtype=torch.bool).tril() | (torch.arange(length) < first))[None, None]


@every_backend
def test_a_prefix_mask_is_one_document(backend):
    """The backend rewrites the attention as non-causal, and keeps the mask."""
    packed = whole(numbers([[0] * 19] * 2), mask=prefix(19, 5))
    assert check_attention("site", packed, backend, grad=True).ok
    rewritten = backend.rewrite(packed)
    assert all(getattr(segment.pattern, "right", 1) for segment in rewritten.segments)
    assert all(bool((segment.mask <= prefix(19, 5)).all()) for segment in rewritten.segments if segment.kv_len == 19)


@every_backend
def test_cross_attention_to_documents_is_not_rewritten(backend):
    packed = whole(numbers(), pattern=Full(cross=True))
    assert backend.rewrite(packed) is packed


@every_backend
def test_unknown_query_positions_are_refused(backend):
    packed = whole(numbers([[0] * 19] * 2))
    (segment,) = packed.segments
    mask = prefix(19, 5)[:, :, 2:6].expand(2, -1, -1, -1)
    step = Attention(packed.query[:, :, 2:6], (replace(segment, mask=mask),), packed.scale)
    assert_refused(lambda: backend.run(step), "key_mask", "19 keys", "4 queries", "Causal(offset=...)")


@every_backend
@pytest.mark.parametrize(
    "terms", [dict(mask=torch.zeros(1, 1, 4, 19, dtype=torch.bool)), dict(mask=None)], ids=["mask", "keys"]
)
def test_without_visible_keys_the_output_is_zero(backend, terms):
    packed = whole(numbers(ROWS[-1:]), key_mask=torch.zeros(1, 19, dtype=torch.bool), mask=None)
    step = Attention(packed.query[:, :, :4], (replace(packed.segments[0], **terms),), packed.scale)
    assert not backend.run(step).output.any()


# Memory


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation allocates."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.storage_offset() == 0:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("name", ["sinks", "lsh"])
def test_no_tensor_is_as_large_as_the_mask(name, monkeypatch):
    monkeypatch.setattr(visible_keys, "_ENTRIES_AT_ONCE", 1 << 14)
    documents = torch.arange(1024)[None] // 128
    packed = whole(documents)
    backend = replace(BACKENDS[name], window=16) if name == "sinks" else replace(BACKENDS[name], chunk_length=16)
    with Largest() as most:
        backend.rewrite(packed)
    assert 0 < most.bytes <= 1024 * 1024 // 4
    far = backend.rewrite(packed).segments[1]
    assert name == "lsh" or far.kv_len == 8 * backend.sinks


@pytest.mark.parametrize(("mask_batch", "has_key_mask"), [(8, False), (1, True), (8, True)])
def test_a_page_counts_the_samples_of_mask_and_key_mask(monkeypatch, mask_batch, has_key_mask):
    monkeypatch.setattr(visible_keys, "_ENTRIES_AT_ONCE", 1 << 14)
    mask = prefix(128, 5).expand(mask_batch, -1, -1, -1)
    key = torch.zeros(8, 1, 128, 4)
    segment = Segment(key, key, key_mask=torch.ones(8, 128, dtype=torch.bool) if has_key_mask else None, mask=mask)
    with Largest() as most:
        visible_keys.read_spans(segment, mask, 128)
    assert 8 * 128 <= most.bytes <= 1 << 14


# Models


@pytest.mark.parametrize("build", [zoo.gpt_neox, lambda: zoo.gpt_bigcode(multi_query=True)], ids=["neox", "mqa"])
@pytest.mark.parametrize("mask", ["4-D mask", "position_ids"])
@every_backend
def test_packed_documents_give_the_logits_of_each_alone(build, mask, backend):
    model, tokens = build(), zoo.ids(1, 24)
    lengths = (11, 4, 9)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    inputs = dict(input_ids=tokens, position_ids=positions, use_cache=False)
    if mask == "4-D mask":
        inputs["attention_mask"] = grid(documents)
    with torch.no_grad(), attnzoo.patch(model, backend) as handle:
        together = model(**inputs).logits
        start = 0
        for length in lengths:
            alone = model(tokens[:, start : start + length], use_cache=False).logits
            torch.testing.assert_close(
                together[:, start : start + length], alone, rtol=0, atol=2e-5 * float(alone.abs().max())
            )
            start += length
    assert all(site.approximate for site in handle.sites)
