"""Hypothesis strategies for attentions: any shape, dtype, memory layout, pattern, mask and bias.

Every strategy lists simple values first, because hypothesis shrinks a failing example to the first values.
"""

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.spec.bias import DenseBias, RelativeBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import FLOATS, Attention, Segment

EVERYTHING = EagerBackend.capabilities
KINDS = ("one", "bias", "globals", "one difference", "wrap-around", "sorted", "hashed")
DIFFERENCES = ("key mask", "mask", "bias", "length", "pattern", "key heads", "values")
MOSTLY = st.sampled_from([True, True, True, False])
_SHORT = st.one_of(st.integers(1, 9), st.integers(10, 80), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
# Backends compute at most 512 rows with a mask, 1024 rows of a stack and 1024 hashed keys at a time.
_LONG = st.sampled_from([513, 600, 1030])
# How many chunks before and after the chunk of a query are visible.
_SIDES = st.tuples(st.sampled_from([1, 0, 2]), st.sampled_from([0, 1, 2]))


@dataclass(frozen=True)
class Sizes:
    """The sizes of an attention."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    value_dim: int

    @property
    def group(self):
        return self.heads // self.kv_heads


@st.composite
def sizes(draw, capabilities=EVERYTHING, dims=(1, 3, 8, 16, 33), equal_lengths=False, is_long=False):
    """Draw sizes. With ``is_long`` there are more rows than in one internal block, and the other sizes are small."""
    lengths = _LONG if is_long else _SHORT
    batch, kv_heads = (draw(st.integers(1, most)) for most in ((1, 1) if is_long else (3, 2)))
    heads = kv_heads * (draw(st.integers(1, 2 if is_long else 3)) if capabilities.gqa else 1)
    kv_len = draw(lengths)
    others = lengths if is_long else st.one_of(st.just(kv_len), st.integers(1, kv_len), lengths)
    q_len = kv_len if equal_lengths else draw(others)
    dim = 8 if is_long else draw(st.sampled_from(dims))
    uneven = capabilities.uneven_value_dim and draw(st.sampled_from([False, False, False, True]))
    return Sizes(batch, heads, kv_heads, q_len, kv_len, dim, draw(st.sampled_from(dims)) if uneven else dim)


class Tensors:
    """Factory of random tensors that require grad. Their scores have the standard deviation ``sharpness``."""

    def __init__(self, seed, dtype, sharpness=1.0, scale=1.0, dim=1, is_strided=False):
        self.random, self._dtype, self._is_strided = torch.Generator().manual_seed(seed), dtype, is_strided
        self.spread = (sharpness / ((abs(scale) or 1.0) * dim**0.5)) ** 0.5

    def normal(self, *shape, std=1.0):
        drawn = (std * torch.randn(shape, generator=self.random, dtype=torch.float64)).to(self._dtype)
        if self._is_strided and len(shape) == 4:  # the layout of models: (batch, length, heads, dim)
            drawn = drawn.transpose(1, 2).contiguous().transpose(1, 2)
        return drawn.requires_grad_()

    def keys_values(self, size, kv_heads=None, kv_len=None):
        shape = (size.batch, kv_heads or size.kv_heads, kv_len or size.kv_len)
        return self.normal(*shape, size.dim, std=self.spread), self.normal(*shape, size.value_dim)

    def orders(self, *shape):
        """Return random permutations along the last dimension."""
        return torch.rand(shape, generator=self.random).argsort(-1)


def _chunk_length(length):
    """Draw the number of tokens per chunk. Most sequences have several chunks."""
    return st.one_of(st.integers(1, max(1, length // 3)), st.integers(1, length + 1))


@st.composite
def patterns(draw, q_len, kv_len, has_chunks=True):
    kinds = ["full", "causal", "window", "causal window"] + (["chunks"] if has_chunks and q_len == kv_len else [])
    kind = draw(st.sampled_from(kinds))
    offset = draw(st.sampled_from([None, None, None, 0, 3]))
    side = st.integers(0, kv_len + 2)
    if kind == "full":
        return attnzoo.Full()
    if kind == "causal":
        return attnzoo.Causal(offset)
    if kind == "causal window":
        return attnzoo.Window(draw(st.integers(1, kv_len + 2)), 0, offset)
    if kind == "window":
        return attnzoo.Window(draw(side), draw(st.integers(1, kv_len + 2)), offset)
    return draw(chunks(kv_len))


@st.composite
def chunks(draw, length, wrap_around=False):
    """Draw chunks. With ``wrap_around``, an end of the sequence sees the other end, and there are at least 3 chunks."""
    shifted = st.sampled_from([(-1, 1), (1, -1)])
    before, after = draw(st.one_of(_SIDES.filter(any) if wrap_around else _SIDES, shifted))
    causal = not wrap_around and draw(st.booleans())
    most = max(1, length // (3 if wrap_around else 1))
    count = draw(st.one_of(st.integers(1, min(3, most)), st.integers(1, most)))  # short chunks make many blocks
    return attnzoo.Chunks(count, before, after, causal)


@st.composite
def key_masks(draw, batch, length):
    """For each sample, padding on the left, on the right, anywhere, everywhere or nowhere."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["none", "left", "right", "anywhere", "all"]))
        real = torch.ones(length, dtype=torch.bool)
        cut = draw(st.integers(0, length))
        if kind == "left":
            real[:cut] = False
        elif kind == "right":
            real[cut:] = False
        elif kind == "anywhere":
            real = torch.rand(length, generator=torch.Generator().manual_seed(cut)) < 0.5
        elif kind == "all":
            real[:] = False
        rows.append(real)
    return torch.stack(rows)


@st.composite
def global_tokens(draw, batch, length):
    """For each sample, no, one, some or all tokens are global."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["zero", "one", "some", "all"]))
        chosen = torch.zeros(length, dtype=torch.bool)
        at = draw(st.integers(0, length - 1))
        if kind == "one":
            chosen[at] = True
        elif kind == "some":
            chosen = torch.rand(length, generator=torch.Generator().manual_seed(at)) < 0.3
        elif kind == "all":
            chosen[:] = True
        rows.append(chosen)
    return torch.stack(rows)


@st.composite
def relative_biases(draw, size, tensors, by_distance=False):
    """Draw a relative bias. Most tables are narrow, so most distances are beyond both ends of the table.

    ``by_distance`` is whether the bias depends only on the distance from a query to a key in the row.
    """
    width, positions = draw(st.integers(1, 12)), None
    values = tensors.normal(draw(st.sampled_from([1, size.heads])), width).detach().requires_grad_(draw(MOSTLY))
    if not by_distance and draw(st.sampled_from([False, False, True])):
        positions = torch.randint(0, size.kv_len, (size.batch, size.q_len), generator=tensors.random)
    offset = draw(st.sampled_from([None, 0] if by_distance else [None, 0, 3]))
    return RelativeBias(values, zero=draw(st.integers(0, width - 1)), offset=offset, positions=positions)


@st.composite
def dense_shapes(draw, size, kv_len=None):
    batch, heads = draw(st.sampled_from([1, size.batch])), draw(st.sampled_from([1, size.heads]))
    return batch, heads, size.q_len, kv_len or size.kv_len


@st.composite
def masks(draw, size, tensors, kv_len=None):
    shape = draw(dense_shapes(size, kv_len))
    return torch.rand(shape, generator=tensors.random) < draw(st.sampled_from([0.6, 0.1]))


@st.composite
def biases(draw, size, tensors, kinds):
    if draw(st.sampled_from(sorted(kinds, reverse=True))) == "relative":
        return draw(relative_biases(size, tensors))
    values = tensors.normal(*draw(dense_shapes(size)))
    return DenseBias(values.detach().requires_grad_(draw(MOSTLY)))


@st.composite
def _one(draw, size, tensors, capabilities, pattern=None, extras=("none", "bias", "mask")):
    """Draw one segment with a mask, a bias or neither, as far as the capabilities allow."""
    key, value = tensors.keys_values(size)
    key_mask = draw(st.one_of(st.none(), key_masks(size.batch, size.kv_len)))
    supported = dict(none=True, bias=bool(capabilities.bias), mask=capabilities.mask)
    extra = draw(st.sampled_from([extra for extra in extras if supported[extra]]))
    bias = draw(biases(size, tensors, capabilities.bias)) if extra == "bias" else None
    mask = draw(masks(size, tensors)) if extra == "mask" else None
    pattern = draw(patterns(size.q_len, size.kv_len)) if pattern is None else pattern
    return (Segment(key, value, pattern, key_mask, mask, bias),)


@st.composite
def _with_globals(draw, size, tensors):
    """Draw a segment of ordinary keys, and a segment of global keys if any sample has global keys."""
    key, value = tensors.keys_values(size)
    pattern = draw(patterns(size.q_len, size.kv_len))
    key_mask = draw(st.one_of(st.none(), key_masks(size.batch, size.kv_len)))
    real = torch.ones((size.batch, size.kv_len), dtype=torch.bool) if key_mask is None else key_mask
    chosen = draw(global_tokens(size.batch, size.kv_len)) & real
    keys = find_global_keys(chosen)
    if keys is None:
        return (Segment(key, value, pattern, key_mask),)
    ordinary = Segment(key, value, pattern, real & ~chosen)
    return ordinary, Segment(keys.take(key), keys.take(value), key_mask=keys.valid)


def supported_differences(capabilities):
    """Return what one of several segments may differ in, if a backend has these capabilities."""
    supported = dict(mask=capabilities.mask, bias=bool(capabilities.bias))
    supported["key heads"] = capabilities.gqa
    return [name for name in DIFFERENCES if supported.get(name, True)]


@st.composite
def _with_one_difference(draw, size, tensors, capabilities, differences):
    """Draw two or three segments that are equal except that one of them differs in one thing."""
    # The other segments share a key mask. It may hide no key, as a backend may skip such a mask.
    nothing_hidden = torch.ones((size.batch, size.kv_len), dtype=torch.bool)
    key_mask = draw(st.one_of(st.none(), st.just(nothing_hidden), key_masks(size.batch, size.kv_len)))
    base = Segment(*tensors.keys_values(size), draw(patterns(size.q_len, size.kv_len)), key_mask)
    segments = [base] * draw(st.sampled_from([2, 2, 3]))
    different = draw(st.sampled_from(differences or supported_differences(capabilities)))
    segments[draw(st.integers(0, len(segments) - 1))] = draw(_changed(base, different, size, tensors, capabilities))
    return tuple(segments)


@st.composite
def _changed(draw, base, different, size, tensors, capabilities):
    """Return a copy of a segment that differs in one thing."""
    if different == "key mask":
        return replace(base, key_mask=draw(key_masks(size.batch, size.kv_len)))
    if different == "mask":
        return replace(base, mask=draw(masks(size, tensors)))
    if different == "bias":
        return replace(base, bias=draw(biases(size, tensors, capabilities.bias)))
    if different == "pattern":
        return replace(base, pattern=draw(patterns(size.q_len, size.kv_len)))
    kv_len = kv_heads = None
    if different == "length" and not isinstance(base.pattern, attnzoo.Chunks):  # chunks need as many keys as queries
        kv_len = draw(st.integers(1, size.kv_len + 3))
    elif different == "key heads":
        kv_heads = size.heads if size.kv_heads == 1 else 1
    key, value = tensors.keys_values(size, kv_heads, kv_len)
    key_mask = base.key_mask if kv_len is None else draw(st.one_of(st.none(), key_masks(size.batch, kv_len)))
    return replace(base, key=key, value=value, key_mask=key_mask)


@st.composite
def _sorted_rounds(draw, size, tensors, capabilities):
    """Draw hash rounds over sorted keys. The first chunk of a round sees the last chunk of the round before."""
    length, count = size.q_len, draw(st.integers(1, 3))
    real = draw(st.one_of(st.none(), key_masks(size.batch, length)))
    orders = [tensors.orders(size.batch, size.kv_heads, length) for _ in range(count)]
    token = torch.cat(orders, dim=2)
    if real is not None:
        hidden = ~real[:, None].expand(-1, size.kv_heads, -1).gather(2, token)
        token = token.masked_fill(hidden, -1)
    key, value = tensors.keys_values(size, kv_len=count * length)
    before, after = draw(st.one_of(_SIDES, st.just((-1, 1))))
    pattern = SortedChunks(draw(_chunk_length(length)), before, after, draw(st.booleans()))
    pattern = replace(pattern, token=token.repeat_interleave(size.group, 1))
    if draw(st.booleans()):  # queries are sorted differently from keys
        orders = [tensors.orders(size.batch, size.heads, length) for _ in range(count)]
    else:
        orders = [order.repeat_interleave(size.group, 1) for order in orders]
    key_mask = draw(st.one_of(st.none(), key_masks(size.batch, count * length)))
    mask = draw(masks(size, tensors, count * length)) if capabilities.mask and draw(st.integers(0, 3)) == 3 else None
    return tuple(
        Segment(key, value, replace(pattern, start=number * length, order=order), key_mask, mask)
        for number, order in enumerate(orders)
    )


@st.composite
def _hashed_rounds(draw, size, tensors, capabilities):
    """Draw hash rounds over the same keys, maybe with a window of neighbours, as the backend ``lsh`` does."""
    key_mask = draw(st.one_of(st.none(), key_masks(size.batch, size.kv_len)))
    mask = draw(masks(size, tensors)) if capabilities.mask and draw(st.integers(0, 3)) == 3 else None
    base, length = Segment(*tensors.keys_values(size), key_mask=key_mask, mask=mask), draw(_chunk_length(size.kv_len))
    sides, causal = draw(_SIDES), draw(st.booleans())
    apart, offset = draw(st.integers(0, 2)), draw(st.sampled_from([None, 0, 3]))
    pattern = HashedChunks(length, *sides, causal, apart, offset)
    segments = [replace(base, pattern=attnzoo.Window(1, 0 if causal else 1, offset))] if apart == 2 else []
    for _ in range(draw(st.integers(1, 3))):
        keys = tensors.orders(size.batch, size.kv_heads, size.kv_len)
        ranks = torch.randint(0, size.kv_len, (size.batch, size.heads, size.q_len), generator=tensors.random)
        chunk = (torch.arange(size.kv_len) // length).repeat(size.batch, 1)
        hash_round = HashRound(keys, keys.argsort(-1), chunk, ranks.argsort(-1), ranks)
        pattern = replace(pattern, rounds=(*pattern.rounds, hash_round))
        segments.append(replace(base, pattern=pattern))
    return tuple(segments)


def supported_kinds(capabilities):
    """Return the kinds of attentions that a backend with these capabilities can compute."""
    unsupported = set() if capabilities.bias else {"bias"}
    unsupported |= {kind for kind, pattern in dict(sorted=SortedChunks, hashed=HashedChunks).items()
                   if pattern not in capabilities.patterns}  # fmt: skip
    return [kind for kind in KINDS if kind not in unsupported]


@st.composite
def attentions(
    draw,
    capabilities=EVERYTHING,
    dims=(1, 3, 8, 16, 33),
    kinds=None,
    differences=None,
    equal_lengths=False,
    is_long=False,
):
    """Draw an attention that a backend with these capabilities should compute, if no further limit applies.

    Args:
        capabilities: the capabilities of the backend. The default is all that the oracle computes.
        dims: the dimensions of a head.
        kinds: the kinds to draw, from ``KINDS``. None means all that the capabilities allow.
        differences: what the only differing segment of the kind "one difference" may differ in.
        equal_lengths: whether there are as many queries as keys. Chunks and sorted keys need this.
        is_long: whether there are more rows than in one internal block.
    """
    kind = draw(st.sampled_from(kinds or supported_kinds(capabilities)))
    size = draw(sizes(capabilities, dims, equal_lengths or kind in ("wrap-around", "sorted"), is_long))
    dtype = draw(st.sampled_from([dtype for dtype in FLOATS if dtype in capabilities.dtypes]))
    scale = draw(st.sampled_from([size.dim**-0.5, 1.0, 0.1, -0.5]))
    # The standard deviation of the scores: from nearly uniform to sharp attention. With larger scores the softmax
    # saturates, and the gradient of any flash kernel consists of the rounding of its output.
    sharpness, is_strided = draw(st.sampled_from([0.3, 1.0, 3.0])), draw(st.booleans())
    tensors = Tensors(draw(st.integers(0, 2**16)), dtype, sharpness, scale, size.dim, is_strided)
    query = tensors.normal(size.batch, size.heads, size.q_len, size.dim, std=tensors.spread)
    if kind == "one":
        segments = draw(_one(size, tensors, capabilities, extras=("none", "mask")))
    elif kind == "bias":
        segments = draw(_one(size, tensors, capabilities, extras=("bias",)))
    elif kind == "globals":
        segments = draw(_with_globals(size, tensors))
    elif kind == "one difference":
        segments = draw(_with_one_difference(size, tensors, capabilities, differences))
    elif kind == "wrap-around":
        segments = draw(_one(size, tensors, capabilities, draw(chunks(size.kv_len, wrap_around=True))))
    elif kind == "sorted":
        segments = draw(_sorted_rounds(size, tensors, capabilities))
    else:
        segments = draw(_hashed_rounds(size, tensors, capabilities))
    query_mask = draw(st.one_of(st.none(), key_masks(size.batch, size.q_len)))
    empty = None
    if draw(st.sampled_from([False, False, True])):
        empty = tensors.normal(size.batch, size.heads, size.q_len, size.value_dim)
    return Attention(query, segments, scale, query_mask=query_mask, empty=empty)


def moved(attention):
    """Return the attention with the masks and the bias of each segment on the next segment, and the same keys."""
    segments = attention.segments
    pairs = zip(segments, segments[-1:] + segments[:-1], strict=True)
    return replace(attention, segments=tuple(
        replace(segment, key_mask=other.key_mask, mask=other.mask, bias=other.bias) for segment, other in pairs
    ))  # fmt: skip
