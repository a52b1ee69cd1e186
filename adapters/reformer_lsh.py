"""Reformer's LSH attention: chunks of tokens sorted by bucket. The module ``reformer`` explains the decisions."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend
from attnzoo.adapters.projections import project_by_head
from attnzoo.adapters.reformer_hashing import HASHED_AT_ONCE, hash_queries
from attnzoo.adapters.reformer_layout import (
    MODULE,
    cached,
    check_length,
    neighbourhoods,
    of_rounds,
    real_tokens,
    steps_ahead,
    where_real,
    with_own_token,
)
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import compute_dtype
from attnzoo.originals.fingerprint import object_at
from attnzoo.patching.interface import rebind
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Causal, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment, describe
from attnzoo.spec.transforms import holds, readable, transforms_around

# Maximum bytes of sorted keys and values in memory at once. For all heads and 4 rounds, these tensors are 8 times as
# large as the output. Fewer heads need less memory, and the queries and outputs of a head stay in the CPU's cache.
SORTED_AT_ONCE = 1 << 26


@dataclass
class BucketNumber:
    """The number of buckets that a site has derived from an input length (see :meth:`LshCall._hasher`), or None."""

    derived: int | list[int] | None = None


class LshCall:
    """The patched forward of an LSH attention module. Each call of the module makes one object."""

    def __init__(self, module: Any, attend: Attend, bucket_number: BucketNumber) -> None:
        self._module, self._attend, self._bucket_number = module, attend, bucket_number

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        num_hashes: int | None = None,
        buckets: Tensor | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Return states ``(batch, length, embed)``, weights if requested, and buckets.

        The buckets ``(batch, heads, hashes, length)`` are None if the input is too short to be hashed.
        """
        module = self._module
        hashes = _check_rounds(module.num_hashes if num_hashes is None else num_hashes)
        batch, length, _ = hidden_states.shape
        wanted, past = bool(output_attentions), cached(module, past_buckets_states, batch)
        if past is not None:
            if length > 1:
                raise InvalidArgumentError("hidden_states", f"{length} tokens with a filled cache", "1 token per call")
            past_buckets, states = past
            lengths = (1,) if past_buckets.numel() else (1, states.shape[1] + 1)
            step = (hidden_states, _mask_of_step(attention_mask, batch, lengths), hashes, wanted, states)
            has_buckets = past_buckets.numel() > 0
            output, weights, buckets = self._decode(*step, past_buckets) if has_buckets else self._extend(*step)
        else:
            query = split_heads(module.query_key(hidden_states), module.attention_head_size)
            value = split_heads(module.value(hidden_states), module.attention_head_size)
            real = real_tokens(self._attend, attention_mask, batch, length)
            if length <= module.chunk_length:
                output, weights = self._short(query, value, real, wanted)
            else:
                check_length(module, length, hashes)
                is_given = buckets is not None
                if buckets is None:
                    buckets = self._hash(query, hashes, attention_mask)
                shape = (batch, module.num_attention_heads, hashes, length)
                if buckets.numel() != math.prod(shape):  # the call in a backward does not get ``num_hashes``
                    raise InvalidArgumentError("buckets", describe(buckets), f"shape {shape} for {hashes} hashes")
                buckets = buckets.view(shape)
                if is_given:  # for the module's own buckets, a device would only let the host wait
                    _check_buckets(buckets)
                size = self._heads_at_once(query, hashes, wanted)
                if size < shape[1]:
                    output, weights = self._by_heads(query, value, buckets, real, size), None
                else:
                    output, weights = self._sorted(query, value, buckets, real, wanted)
        if buckets is not None:
            buckets = buckets.view(batch, module.num_attention_heads, hashes, -1)
        returned: tuple[Tensor, Any, Tensor | None] = object_at(f"{MODULE}:LSHSelfAttentionOutput")(
            merge_heads(output), () if weights is None else weights, buckets
        )
        return returned

    def _hash(self, query: Tensor, hashes: int, attention_mask: Tensor | None) -> Tensor:
        """Return the module's buckets ``(batch, heads, hashes * length)`` of queries ``(batch, heads, length, dim)``.

        The original code hashes short inputs on the CPU, and under ``torch.func`` transforms.
        """
        length = query.shape[2]
        if attention_mask is not None and not readable(attention_mask):  # the module's hashing reads the values
            got = f"{describe(attention_mask)}, which vmap maps over"
            raise InvalidArgumentError("attention_mask", got, "a tensor with in_dims=None in vmap")
        hasher = self._hasher(length)
        is_large = length >= 2 * HASHED_AT_ONCE or query.device.type != "cpu"
        if is_large and not transforms_around((query,)):
            return hash_queries(hasher, query, hashes, attention_mask)
        return torch.as_tensor(hasher._hash_vectors(query, hashes, attention_mask))

    def _hasher(self, length: int) -> Any:
        """Return the module or, if its ``num_buckets`` is None, a copy in which ``num_buckets`` is set.

        The first call derives the number from ``length``. Later calls use the same number.
        """
        module = self._module
        if module.num_buckets is not None:
            return module
        twin = copy.copy(module)
        if self._bucket_number.derived is None:
            twin.config = SimpleNamespace()
            silent = SimpleNamespace(warning=lambda text: None)  # drops the warning that the config changes
            rebind(type(module)._set_num_buckets, logger=silent)(twin, length)
            self._bucket_number.derived = twin.num_buckets
        twin.num_buckets = self._bucket_number.derived
        return twin

    def _attention(
        self, query: Tensor, segments: tuple[Segment, ...], empty: Tensor, real: Tensor | None = None
    ) -> Attention:
        dropout = self._module.dropout if self._module.training else 0.0
        return Attention(query, segments, 1.0, dropout, query_mask=real, empty=empty)

    def _keys(self, queries: Tensor) -> Tensor:
        """Return the keys: the normalised queries divided by ``sqrt(head_dim)``. So scores need no other scale."""
        keys: Tensor = self._module._len_and_dim_norm(queries, math.sqrt(self._module.attention_head_size))
        return keys

    def _short(self, query: Tensor, value: Tensor, real: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return output and, if wanted, weights for an input of at most one chunk.

        A token sees all other tokens. In a causal module, it sees all earlier tokens.
        """
        dtype, length = compute_dtype(query), query.shape[2]
        query, key, value = query.to(dtype), self._keys(query).to(dtype), value.to(dtype)
        patterns = (Causal(offset=-1), *(() if self._module.is_decoder else (window_ahead(self._module),)))
        segments = tuple(Segment(key, value, pattern, key_mask=real) for pattern in patterns)
        result = self._attend(self._attention(query, segments, value, real), wanted)
        if result.dropped is None or result.probabilities is None:
            return result.output, None
        own = torch.eye(length, dtype=torch.bool, device=query.device)[None, None]
        dropped, weights = (torch.stack(grids).sum(0) for grids in (result.dropped, result.probabilities))
        return result.output, with_own_token(dropped, weights.sum(-1, keepdim=True), own)

    def _heads_at_once(self, query: Tensor, hashes: int, wanted: bool) -> int:
        """Return how many heads :meth:`_sorted` computes at a time. The output does not depend on this number.

        On a GPU, these are all heads, because many small kernels would take longer. If gradients, dropout,
        probabilities or transforms are needed, these are all heads too.
        """
        batch, heads, length, dim = query.shape
        needs_all = torch.is_grad_enabled() or self._module.training or wanted or transforms_around((query,))
        if query.device.type != "cpu" or needs_all:
            return heads
        bytes_per_head = 2 * batch * hashes * length * dim * compute_dtype(query).itemsize
        return min(heads, max(1, SORTED_AT_ONCE // bytes_per_head))

    def _by_heads(self, query: Tensor, value: Tensor, buckets: Tensor, real: Tensor | None, size: int) -> Tensor:
        """Return the output ``(batch, heads, length, dim)`` of :meth:`_sorted`, computed ``size`` heads at a time."""
        batch, heads, length, dim = query.shape
        output = query.new_empty((batch, length, heads, dim), dtype=compute_dtype(query)).transpose(1, 2)
        # All calls write sorted keys and values to the same memory, because new memory is slow at the first write.
        shape = (batch, size, buckets.shape[2] * length, dim)
        memory = (
            query.new_empty(shape, dtype=compute_dtype(query)),
            query.new_empty(shape, dtype=compute_dtype(query)),
        )
        for start in range(0, heads, size):
            part = slice(start, start + size)
            given = (query[:, part], value[:, part], buckets[:, part], real)
            output[:, part], _ = self._sorted(*given, wanted=False, memory=memory)
        return output

    def _sorted(
        self,
        query: Tensor,
        value: Tensor,
        buckets: Tensor,
        real: Tensor | None,
        wanted: bool,
        memory: tuple[Tensor | None, ...] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and, if wanted, weights of LSH attention. ``buckets`` is ``(batch, heads, hashes, length)``.

        ``memory`` receives the sorted keys and the sorted values, ``(batch, heads, hashes * length, dim)``.
        """
        module, dtype = self._module, compute_dtype(query)
        hashes, length = buckets.shape[2:]
        order = buckets.argsort(dim=-1, stable=True)
        token = order.flatten(2)
        value = value.to(dtype)
        sorted_key, sorted_value = (
            _rows(tensor, token, out) for tensor, out in zip((self._keys(query).to(dtype), value), memory, strict=True)
        )
        query = query.to(dtype)
        if real is not None:
            token = token.masked_fill(~real[:, None].expand(-1, token.shape[1], -1).gather(2, token), -1)
        count = check_length(module, length, hashes)
        chunk, causal, sides = module.chunk_length, bool(module.is_decoder), neighbourhoods(module, count)
        patterns = (
            SortedChunks(chunk, before, after, causal, number * length, order[:, :, number], token)
            for number in range(hashes)
            for before, after in sides
        )
        segments = tuple(Segment(sorted_key, sorted_value, pattern) for pattern in patterns)
        result = self._attend(self._attention(query, segments, value, real), wanted)
        if result.dropped is None or result.probabilities is None:
            return result.output, None
        return result.output, of_rounds(result.probabilities, result.dropped, order, chunk, steps_ahead(module, count))

    def _extend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, hashes: int, wanted: bool, past: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return output, weights (if wanted) and buckets of a decoding step without cached buckets.

        The new token sees all cached tokens. The buckets are those of the cached tokens and the new token, or None if
        these tokens do not fill a chunk.
        """
        module = self._module
        states = torch.cat([past, hidden_states], dim=1)
        dim = module.attention_head_size
        query, value = (split_heads(project(states), dim) for project in (module.query_key, module.value))
        buckets = self._hash(query, hashes, attention_mask) if states.shape[1] >= module.chunk_length else None
        dtype = compute_dtype(query)
        key, value = self._keys(query).to(dtype), value.to(dtype)
        segment = Segment(key[:, :, :-1], value[:, :, :-1])
        result = self._attend(self._attention(query[:, :, -1:].to(dtype), (segment,), value[:, :, -1:]), wanted)
        weights = None if result.dropped is None else torch.nn.functional.pad(result.dropped[0], (0, 1))
        return result.output, weights, buckets

    def _decode(
        self, hidden_states: Tensor, mask: Tensor | None, hashes: int, wanted: bool, past: Tensor, past_buckets: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return output, weights (if wanted) and buckets of a decoding step with cached buckets.

        In each round, the new token sees its own chunk and the neighbouring chunks of the sorted tokens.
        """
        module = self._module
        if past_buckets.shape[2] != hashes:
            raise InvalidArgumentError("num_hashes", hashes, f"{past_buckets.shape[2]}, as in past_buckets_states")
        query = split_heads(module.query_key(hidden_states), module.attention_head_size)
        find_neighbours = self._hasher(past.shape[1])._get_relevant_hid_states_and_buckets
        states, tokens, buckets = find_neighbours(query, mask, hashes, hidden_states, past, past_buckets)
        tokens = tokens.flatten(2)  # (batch, heads, hashes * neighbours): the token index of each state
        dtype, heads = compute_dtype(query), module.num_attention_heads
        key = self._keys(project_by_head(module.query_key, states, heads)).to(dtype)
        value = project_by_head(module.value, states, heads).to(dtype)
        own = (tokens == past.shape[1])[:, :, None]
        itself = _rows(value, own[:, :, 0].long().argmax(-1, keepdim=True))
        # Each head must hide different keys, so each head becomes a sample with a separate key mask.
        query, key, value, itself = (tensor.flatten(0, 1)[:, None] for tensor in (query.to(dtype), key, value, itself))
        segment = Segment(key, value, key_mask=~own.flatten(0, 2))
        result = self._attend(self._attention(query, (segment,), itself), wanted)
        output = result.output.view(*own.shape[:3], -1)
        if result.dropped is None or result.probabilities is None:
            return output, None, buckets
        weights, kept, own = (
            tensor.view(own.shape).unflatten(-1, (hashes, -1)).transpose(2, 3)
            for tensor in (result.probabilities[0], result.dropped[0], own)
        )
        return output, with_own_token(kept, weights.sum(-1, keepdim=True), own), buckets


def _mask_of_step(attention_mask: Tensor | None, batch: int, lengths: tuple[int, ...]) -> Tensor | None:
    """Return ``attention_mask`` for a decoding step, or None if no token is padding.

    Raise unless the length of the mask is one of ``lengths``.
    """
    if attention_mask is None or where_real(attention_mask) is None:
        return None
    if tuple(attention_mask.shape) not in [(batch, length) for length in lengths]:
        allowed = " or ".join(str((batch, length)) for length in lengths)
        raise InvalidArgumentError("attention_mask", describe(attention_mask), f"shape {allowed}, with 0 for padding")
    return attention_mask


def _check_buckets(buckets: Tensor) -> None:
    """Raise unless each hash round of ``(batch, heads, hashes, length)`` has larger values than the round before."""
    if buckets.shape[2] > 1 and holds((buckets[:, :, 1:].amin(-1) <= buckets[:, :, :-1].amax(-1)).any(), unknown=False):
        allowed = "larger values in each hash round than in the hash round before"
        raise InvalidArgumentError("buckets", describe(buckets), allowed)


def _check_rounds(hashes: Any) -> int:
    try:
        number = operator.index(hashes)
    except TypeError:
        number = 0
    if number < 1:
        raise InvalidArgumentError("num_hashes", repr(hashes), "an integer >= 1")
    return number


def window_ahead(module: Any) -> Window:
    """Return a pattern in which a query sees all later tokens of an input that is not longer than a chunk."""
    return Window(0, module.chunk_length, offset=1)


def _rows(tensor: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the rows of ``(batch, heads, n, dim)`` at ``index`` ``(batch, heads, m)``. Faster than ``gather``.

    If ``out`` is given, the result is written to the first heads of ``out``.
    """
    batch, heads, length, dim = tensor.shape
    # Rows of a head that are next to each other in memory are faster to read in any order.
    firsts = torch.arange(0, batch * heads * length, length, device=index.device)
    numbers = (index + firsts.view(batch, heads, 1)).flatten()
    rows = tensor.reshape(-1, dim)
    if out is None:
        return rows.index_select(0, numbers).view(batch, heads, -1, dim)
    written = out.view(-1, dim)[: len(numbers)]
    return torch.index_select(rows, 0, numbers, out=written).view(batch, heads, -1, dim)
