"""The plan of calls: for any pattern and masks, each query meets each key it sees exactly once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnzoo
from attnzoo.backends.common.tensor_cache import TensorCache
from attnzoo.backends.varlen import calls
from attnzoo.backends.varlen.calls import may_hide_keys, plan_calls
from attnzoo.backends.varlen.sorted_calls import fold_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window


def meetings(attention, plan):
    """Count how often the calls show each key to each query: ``(batch, q_len, kv_len)`` for each segment.

    As in FlashAttention, the last query of a sequence is at its last key, an extent >= the longest
    sequence of keys means no limit, and if only one extent has no limit, it becomes that length.
    """
    counts = [torch.zeros(attention.batch * attention.q_len + 1, attention.batch * s.kv_len + 1, dtype=torch.long)
              for s in attention.segments]  # fmt: skip
    for call in plan.calls:
        sequences = call.sequences
        left, right = (
            -1 if extent >= max(sequences.k_lens) else extent for extent in (sequences.left, sequences.right)
        )
        if left >= 0 or right >= 0:
            left, right = (max(sequences.k_lens) if extent < 0 else extent for extent in (left, right))
        q_rows = torch.arange(sum(sequences.q_lens)) if call.q_rows is None else call.q_rows
        k_rows = torch.arange(sum(sequences.k_lens)) if call.k_rows is None else call.k_rows
        assert len(q_rows) == sum(sequences.q_lens) and len(k_rows) == sum(sequences.k_lens)
        pairs = zip(q_rows.split(sequences.q_lens), k_rows.split(sequences.k_lens), strict=True)
        for queries, keys in pairs:
            position = torch.arange(len(queries))[:, None] + len(keys) - len(queries)
            key = torch.arange(len(keys))
            visible = torch.ones((len(queries), len(keys)), dtype=torch.bool)
            if left >= 0:
                visible &= key >= position - left
            if right >= 0:
                visible &= key <= position + right
            assert visible.any(1).all(), "a query of the call sees no key of the call"
            counts[call.segment].index_put_((queries[:, None], keys[None]), visible.long(), accumulate=True)
    met = []
    for count, segment, hidden in zip(counts, attention.segments, plan.hidden, strict=True):
        count = count[:-1, :-1].unflatten(1, (attention.batch, -1)).unflatten(0, (attention.batch, -1))
        per_sample = torch.stack([count[sample, :, sample] for sample in range(attention.batch)])
        assert int(per_sample.sum()) == int(count.sum()), "a query meets the keys of another sample"
        if hidden is not None:
            assert segment.key_mask is not None
            per_sample = per_sample * ~hidden[:, None]
        met.append(per_sample)
    return met


def visible_keys(attention, segment):
    """Which keys each query sees by definition, ``(batch, q_len, kv_len)`` bool, for one head."""
    visible = segment.visible(torch.arange(attention.q_len), torch.arange(segment.kv_len), attention.q_len)
    shape = (attention.batch, attention.q_len, segment.kv_len)
    return torch.ones(shape, dtype=torch.bool) if visible is None else visible[:, 0].expand(shape)


def check(attention, windows=True):
    plan = plan_calls(attention, windows)
    for segment, met in zip(attention.segments, meetings(attention, plan), strict=True):
        real = torch.ones(attention.batch, attention.q_len, 1, dtype=torch.bool)
        if attention.query_mask is not None:
            real = attention.query_mask[..., None]
        expected = visible_keys(attention, segment)
        assert torch.equal((met * real).bool(), expected & real)
        assert int(met.max()) <= 1, "a query meets a key twice"
    return plan


masks = st.sampled_from(["none", "left", "right", "both", "holes", "sample", "nothing"])
offsets = st.one_of(st.none(), st.integers(-6, 12))
patterns = st.one_of(
    st.just(Full()),
    st.builds(Causal, offsets),
    st.builds(Window, st.integers(0, 6), st.integers(1, 6), offsets),
    st.builds(Window, st.integers(1, 6), st.just(0), offsets),
    st.builds(Chunks, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.booleans()),
    st.builds(Chunks, st.integers(1, 5), st.just(-1), st.integers(1, 2), st.booleans()),
)


def mask_of(kind, length):
    """Bool ``(3, length)``: a mask of this kind, different in each sample."""
    mask = torch.ones((3, length), dtype=torch.bool)
    for row in range(3):
        cut = (row + 1) * length // 4
        if kind in ("left", "both"):
            mask[row, :cut] = False
        if kind in ("right", "both"):
            mask[row, length - cut // 2 :] = False
        if kind == "holes":
            mask[row, row::3] = False
    if kind == "sample":
        mask[1] = False
    return None if kind == "none" else torch.zeros_like(mask) if kind == "nothing" else mask


@given(patterns, st.integers(1, 14), st.integers(1, 14), masks, masks, st.booleans())
def test_every_query_meets_every_key_it_sees_once(pattern, q_len, kv_len, of_keys, of_queries, windows):
    if isinstance(pattern, Chunks):
        kv_len = q_len
    if isinstance(pattern, Window):
        windows = True
    key = torch.zeros(3, 1, kv_len, 2)
    segment = attnzoo.Segment(key, key, pattern, key_mask=mask_of(of_keys, kv_len))
    attention = attnzoo.Attention(torch.zeros(3, 1, q_len, 2), (segment,), 1.0, query_mask=mask_of(of_queries, q_len))
    plan = check(attention, windows)
    (request,) = attention.request().segments
    if plan.hidden[0] is not None:
        assert may_hide_keys(request)
    if not may_hide_keys(request):
        rows = [call.q_rows for call in plan.calls]
        total = sum(sum(call.sequences.q_lens) for call in plan.calls)
        assert total <= 3 * q_len and (len(rows) <= 1 or len(torch.cat(rows).unique()) == total), "a query in two calls"
    if not windows:
        assert all((call.sequences.left, call.sequences.right) in ((-1, -1), (-1, 0)) for call in plan.calls)


@given(st.integers(1, 5), st.integers(0, 2), st.integers(0, 2), st.booleans(), st.integers(1, 13), masks)
def test_sorted_chunks_meet_the_keys_that_their_tokens_allow(length, before, after, causal, tokens, of_keys):
    random = torch.Generator().manual_seed(tokens)
    orders = [torch.rand((3, 2, tokens), generator=random).argsort(-1) for _ in range(2)]
    token = torch.cat(orders, dim=2)
    if of_keys in ("none", "left", "holes"):
        token = token.masked_fill(token % 3 == 0, -1)
    key = torch.zeros(3, 2, 2 * tokens, 2)
    chunks = SortedChunks(length, before, after, causal)
    key_mask = mask_of(of_keys, 2 * tokens)
    rounds = [attnzoo.Segment(key, key, SortedChunks(length, before, after, causal, start, order, token), key_mask)
              for start, order in zip((0, tokens), orders, strict=True)]  # fmt: skip
    assert may_hide_keys(attnzoo.SegmentRequest(chunks, 2))
    check(fold_heads(attnzoo.Attention(torch.zeros(3, 2, tokens, 2), tuple(rounds), 1.0)))


@pytest.fixture
def two_sequences(monkeypatch):
    """Limit a kernel call to two sequences."""
    monkeypatch.setattr(calls, "MAX_SEQUENCES", 2)
    monkeypatch.setattr(calls, "_plans", TensorCache())


@pytest.mark.parametrize("of_keys", ["none", "left", "holes"])
@pytest.mark.parametrize(
    "pattern", [Full(), Causal(), Window(4, 3), Chunks(3, 1, 1), Chunks(4, 1, 0, causal=True), SortedChunks(4)], ids=str
)
def test_too_many_sequences_become_several_calls(two_sequences, pattern, of_keys):
    key = torch.zeros(3, 1, 14, 2)
    if isinstance(pattern, SortedChunks):
        order = torch.arange(14).flip(0).expand(3, 1, 14)
        pattern = SortedChunks(4, 1, 0, order=order, token=order)
    segment = attnzoo.Segment(key, key, pattern, key_mask=mask_of(of_keys, 14))
    plan = check(attnzoo.Attention(key, (segment,), 1.0))
    assert len(plan.calls) > 1 and max(len(call.sequences.q_lens) for call in plan.calls) <= 2


def single_head(pattern, q_len, kv_len, key_mask=None, query_mask=None):
    key = torch.zeros(1, 1, kv_len, 2)
    segment = attnzoo.Segment(key, key, pattern, key_mask=key_mask)
    return attnzoo.Attention(torch.zeros(1, 1, q_len, 2), (segment,), 1.0, query_mask=query_mask)


@pytest.mark.parametrize("pattern", [Full(), Causal(), Window(4, 4), Window(4, 0)], ids=str)
def test_a_plan_without_masks_gathers_no_rows(pattern):
    (call,) = plan_calls(single_head(pattern, 20, 20)).calls
    assert call.q_rows is None and call.k_rows is None
    window = (pattern.left, pattern.right) if isinstance(pattern, Window) else (-1, 0 if pattern == Causal() else -1)
    assert (call.sequences.left, call.sequences.right) == window


def test_right_padding_does_not_change_the_window():
    real = torch.arange(20)[None] < 13
    plan = plan_calls(single_head(Window(4, 4), 20, 20, key_mask=real, query_mask=real))
    (call,) = plan.calls
    assert plan.hidden == (None,)
    assert (call.sequences.q_lens, call.sequences.k_lens) == ((13,), (13,))
    assert (call.sequences.left, call.sequences.right) == (4, 4)


def test_a_hidden_first_key_is_left_out_of_the_call():
    ordinary = torch.arange(20)[None] > 0
    plan = plan_calls(single_head(Window(4, 4), 20, 20, key_mask=ordinary))
    (call,) = plan.calls
    assert plan.hidden == (None,) and (call.sequences.q_lens, call.sequences.k_lens) == ((20,), (19,))


def test_a_hidden_key_in_the_middle_keeps_its_position():
    ordinary = torch.arange(20)[None] != 9
    plan = plan_calls(single_head(Window(4, 4), 20, 20, key_mask=ordinary))
    (hidden,) = plan.hidden
    assert hidden.nonzero().tolist() == [[0, 9]]
    assert plan.calls[0].q_rows is None and plan.calls[0].k_rows is None


def test_a_new_token_reads_only_its_window_of_the_cache():
    (call,) = plan_calls(single_head(Window(4, 0), 1, 20)).calls
    assert call.sequences.k_lens == (5,) and call.k_rows.tolist() == [15, 16, 17, 18, 19]


def test_layers_with_equal_masks_share_the_plan():
    mask = torch.arange(20)[None] < 13
    first = plan_calls(single_head(Window(4, 4), 20, 20, key_mask=mask))
    assert plan_calls(single_head(Window(4, 4), 20, 20, key_mask=mask)) is first
    assert plan_calls(single_head(Window(4, 3), 20, 20, key_mask=mask)) is not first
    assert plan_calls(single_head(Window(4, 4), 20, 20, query_mask=mask)) is not first
    assert plan_calls(single_head(Window(4, 4), 20, 20, key_mask=mask.clone())) is first, "the same content"
    mask.numpy()[0, 13] = True
    assert plan_calls(single_head(Window(4, 4), 20, 20, key_mask=mask)).calls[0].sequences.k_lens == (14,)
