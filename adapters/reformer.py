"""Reformer: attention within chunks, of neighbours by position or by hash (Kitaev et al. 2020, arXiv:2001.04451).

Local attention looks at the chunks around a token's own. LSH attention hashes queries, which are also the keys, into
buckets, several times over; sorts the tokens of all rounds into one list; and looks at the chunks around each copy's own
in that list. A token does not see itself, unless it sees nothing else: then it gets its own value. Rounds are segments
on the same sorted keys, under one softmax, which is what the model's weights by log-sum-exp amount to.

Decisions:

- Buckets. The module hashes by its own method, so that rotations, buckets and the use of the random stream are the
  model's; buckets handed in (the reversible layers hand in theirs on the way back) are used as they are.
- ``num_buckets=None``. The model derives a number from the first input it sees and writes it into the module and the
  config. Under a patch the same number is derived, and the patch remembers it; module and config keep their None, so
  that removing the patch leaves nothing behind. Where the model fails for lack of a number (decoding from a prompt
  shorter than a chunk), one is derived from the length at which it is first needed.
- Padding. Padding queries get zeros, and so do tokens of local attention that see nothing.
- Decoding with the cache shows a token what the model shows it, without causal or padding mask: with several samples,
  the model looks up the cached states of the first for all of them, and so do we.
- ``output_attentions`` gives the layout of the model: weights within each chunk's neighbourhood, in sorted order,
  normalised per round.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, Forward, Seam, parameter_of
from attnzoo.adapters.reformer_weights import in_chunks, of_rounds, with_own_token
from attnzoo.errors import InvalidArgumentError
from attnzoo.fingerprint import locate
from attnzoo.functional import compute_dtype
from attnzoo.interface import rebind
from attnzoo.patterns import Causal, Chunks, Full, Pattern, SortedChunks
from attnzoo.segments import Attention, Request, Segment, SegmentRequest, describe

_MODULE = "transformers.models.reformer.modeling_reformer"


# --- what both kinds share


def _heads(module: Any, states: Tensor) -> Tensor:
    """``(batch, length, embed)`` to ``(batch, heads, length, head_dim)``."""
    return states.unflatten(-1, (module.num_attention_heads, module.attention_head_size)).transpose(1, 2)


def _merge(output: Tensor) -> Tensor:
    """``(batch, heads, length, head_dim)`` to ``(batch, length, embed)``."""
    return output.transpose(1, 2).flatten(2)


def _real(attention_mask: Tensor) -> Tensor | None:
    """Which tokens are not padding, ``(batch, length)`` bool; None: all of them."""
    if attention_mask.is_floating_point() and bool(attention_mask.isnan().any()):
        raise InvalidArgumentError("attention_mask", f"{describe(attention_mask)} with NaN in it", "no NaN")
    real = attention_mask.bool()
    return None if bool(real.all()) else real


def _real_tokens(attend: Attend, attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch, length):
        raise InvalidArgumentError("attention_mask", describe(attention_mask), f"({batch}, {length}), 0 for padding")
    return attend.once(attention_mask, "real", _real)


def _check_length(module: Any, length: int, copies: int = 1) -> int:
    """The number of chunks of the whole list."""
    if length * copies % module.chunk_length:
        raise InvalidArgumentError(
            "hidden_states", f"{length} tokens", f"a multiple of the chunk length {module.chunk_length}"
        )
    return length * copies // module.chunk_length


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is not None:
            raise InvalidArgumentError(name, describe(given), "None: this attention does not know it")


def _ahead(module: Any, count: int) -> list[int]:
    """How many chunks ahead of a query's own each chunk of its neighbourhood stands, one of ``count`` chunks in all.

    The model rotates its chunks by slicing, so that a rotation by more than ``count`` is none.
    """
    steps = range(-module.num_chunks_before, module.num_chunks_after + 1)
    return [step if abs(step) < count else 0 for step in steps]


def _neighbourhoods(module: Any, count: int) -> list[tuple[int, int]]:
    """``(before, after)`` per segment, for all chunks of a neighbourhood together or, if any comes twice, for each.

    Where the neighbourhood is longer than the list, the model counts the same chunk several times over.
    """
    before, after = module.num_chunks_before, module.num_chunks_after
    if before + after < count:
        return [(before, after)]
    return [(-ahead, ahead) for ahead in _ahead(module, count)]


# --- local attention


def _local_forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_buckets_states: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    num_hashes: int | None = None,
    buckets: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The module's forward: ``(batch, length, embed)`` in and out; ``num_hashes`` and ``buckets`` mean nothing here."""
    _refuse_unknown(kwargs)
    batch, length, _ = hidden_states.shape
    chunk, causal = module.chunk_length, bool(module.is_decoder)
    states, ahead = hidden_states, [0]
    if past_buckets_states is not None and len(past_buckets_states) > module.layer_idx:
        past = past_buckets_states.states_cache[module.layer_idx]
        relevant = module._retrieve_relevant_hidden_states(past, chunk, module.num_chunks_before)
        states = torch.cat([relevant, hidden_states], dim=1)
        if length > (1 if causal else chunk):
            raise InvalidArgumentError("hidden_states", f"{length} tokens on a filled cache", "one token at a time")
    query = _heads(module, module.query(hidden_states))
    key, value = _heads(module, module.key(states)), _heads(module, module.value(states))
    query, key, value = (tensor.to(compute_dtype(query)) for tensor in (query, key, value))
    real = _real_tokens(attend, attention_mask, batch, key.shape[2])
    patterns: list[Pattern] = [Full()]
    if length > chunk:
        count = _check_length(module, length)
        patterns = [Chunks(chunk, *sides, causal=causal) for sides in _neighbourhoods(module, count)]
        ahead = _ahead(module, count)
    elif causal and key.shape[2] == length:
        patterns = [Causal(offset=0)]
    segments = tuple(Segment(key, value, pattern, key_mask=real) for pattern in patterns)
    query_mask = real if key.shape[2] == length else None
    scale = 1.0 / math.sqrt(module.attention_head_size)
    attention = Attention(query, segments, scale, module.dropout if module.training else 0.0, query_mask)
    result = attend(attention, bool(output_attentions))
    weights: Any = ()
    if result.dropped is not None:
        weights = result.dropped[0]
        if length > chunk:
            weights = in_chunks(result.dropped, chunk, ahead)
    return locate(f"{_MODULE}:LocalSelfAttentionOutput")(_merge(result.output), weights)


def _local_bind(module: Any, attend: Attend) -> Forward:
    return partial(_local_forward, module, attend)


# --- LSH attention


class _LSHForward:
    """The forward of an LSH attention; remembers the number of buckets it derived, if it had to."""

    def __init__(self, module: Any, attend: Attend) -> None:
        self._module, self._attend = module, attend
        self._num_buckets: int | list[int] | None = None

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
        """``(batch, length, embed)`` in and out, with buckets ``(batch, heads, num_hashes, length)`` where it hashes."""
        _refuse_unknown(kwargs)
        module = self._module
        hashes = module.num_hashes if num_hashes is None else num_hashes
        batch, length, _ = hidden_states.shape
        wanted = bool(output_attentions)
        if past_buckets_states is not None and len(past_buckets_states) > module.layer_idx:
            if length > 1:
                raise InvalidArgumentError("hidden_states", f"{length} tokens on a filled cache", "one token at a time")
            past = past_buckets_states.states_cache[module.layer_idx]
            past_buckets = past_buckets_states.buckets_cache[module.layer_idx]
            one = (hidden_states, attention_mask, hashes, wanted, past)
            output, weights, buckets = self._decode(*one, past_buckets) if past_buckets.numel() else self._extend(*one)
        else:
            query, value = _heads(module, module.query_key(hidden_states)), _heads(module, module.value(hidden_states))
            real = _real_tokens(self._attend, attention_mask, batch, length)
            if length <= module.chunk_length:
                output, weights = self._short(query, value, real, wanted)
            else:
                _check_length(module, length, hashes)
                if buckets is None:
                    buckets = self._hasher(length)._hash_vectors(query, hashes, attention_mask)
                buckets = buckets.view(batch, module.num_attention_heads, hashes, length)
                output, weights = self._sorted(query, value, buckets, real, wanted)
        if buckets is not None:
            buckets = buckets.view(batch, module.num_attention_heads, hashes, -1)
        return locate(f"{_MODULE}:LSHSelfAttentionOutput")(_merge(output), () if weights is None else weights, buckets)

    def _hasher(self, length: int) -> Any:
        """The module; with the number of buckets it would derive from a length, if it has none."""
        module = self._module
        if module.num_buckets is not None:
            return module
        twin = copy.copy(module)
        if self._num_buckets is None:
            twin.config = SimpleNamespace()
            silent = SimpleNamespace(warning=lambda text: None)  # it would say that the config is being written
            rebind(type(module)._set_num_buckets, logger=silent)(twin, length)
            self._num_buckets = twin.num_buckets
        twin.num_buckets = self._num_buckets
        return twin

    def _attention(
        self, query: Tensor, segments: tuple[Segment, ...], own: Tensor, real: Tensor | None = None
    ) -> Attention:
        dropout = self._module.dropout if self._module.training else 0.0
        return Attention(query, segments, 1.0, dropout, query_mask=real, empty=own)

    def _keys(self, queries: Tensor) -> Tensor:
        """Keys are the queries, each of length 1: that is all the scaling there is."""
        keys: Tensor = self._module._len_and_dim_norm(queries, math.sqrt(self._module.attention_head_size))
        return keys

    def _short(
        self, query: Tensor, value: Tensor, real: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Everything at once, but for the own token."""
        dtype, length = compute_dtype(query), query.shape[2]
        query, key, value = query.to(dtype), self._keys(query).to(dtype), value.to(dtype)
        segment = Segment(key, value, Causal(offset=-1), key_mask=real)
        own = torch.eye(length, dtype=torch.bool, device=query.device)[None, None]
        if not self._module.is_decoder:
            segment = Segment(key, value, key_mask=real, mask=~own)
        result = self._attend(self._attention(query, (segment,), value, real), wanted)
        if result.dropped is None or result.probabilities is None:
            return result.output, None
        return result.output, with_own_token(result.dropped[0], result.probabilities[0].sum(-1, keepdim=True), own)

    def _sorted(
        self, query: Tensor, value: Tensor, buckets: Tensor, real: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Chunks of the sorted list of all rounds; ``buckets`` is ``(batch, heads, hashes, length)``."""
        module, dtype = self._module, compute_dtype(query)
        hashes, length = buckets.shape[2:]
        if hashes > 1 and bool((buckets[:, :, 1:].amin(-1) <= buckets[:, :, :-1].amax(-1)).any()):
            raise InvalidArgumentError("buckets", describe(buckets), "numbers that grow from one hash round to the next")
        query, key, value = query.to(dtype), self._keys(query).to(dtype), value.to(dtype)
        order = buckets.argsort(dim=-1, stable=True)
        token = order.flatten(2)
        sorted_key, sorted_value = _rows(key, token), _rows(value, token)
        if real is not None:
            token = token.masked_fill(~real[:, None].expand(-1, token.shape[1], -1).gather(2, token), -1)
        count = _check_length(module, length, hashes)
        chunk, causal, sides = module.chunk_length, bool(module.is_decoder), _neighbourhoods(module, count)
        segments = tuple(
            Segment(
                sorted_key,
                sorted_value,
                SortedChunks(chunk, before, after, causal, number * length, order[:, :, number], token),
            )
            for number in range(hashes)
            for before, after in sides
        )
        result = self._attend(self._attention(query, segments, value, real), wanted)
        if result.dropped is None or result.probabilities is None:
            return result.output, None
        return result.output, of_rounds(result.probabilities, result.dropped, order, chunk, _ahead(module, count))

    def _extend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, hashes: int, wanted: bool, past: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One token more, on a cache too short for buckets: it sees everything. Hashes once there is a chunk."""
        module = self._module
        states = torch.cat([past, hidden_states], dim=1)
        query, value = _heads(module, module.query_key(states)), _heads(module, module.value(states))
        buckets = None
        if states.shape[1] >= module.chunk_length:
            buckets = self._hasher(states.shape[1])._hash_vectors(query, hashes, attention_mask)
        dtype = compute_dtype(query)
        key, value = self._keys(query).to(dtype), value.to(dtype)
        segment = Segment(key[:, :, :-1], value[:, :, :-1])
        result = self._attend(self._attention(query[:, :, -1:].to(dtype), (segment,), value[:, :, -1:]), wanted)
        weights = None if result.dropped is None else torch.nn.functional.pad(result.dropped[0], (0, 1))
        return result.output, weights, buckets

    def _decode(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        hashes: int,
        wanted: bool,
        past: Tensor,
        past_buckets: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One token more, on cached states and buckets: it sees its neighbourhood in each round's sorted list."""
        module = self._module
        query = _heads(module, module.query_key(hidden_states))
        states, tokens, buckets = self._hasher(past.shape[1])._get_relevant_hid_states_and_buckets(
            query_vectors=query,
            attention_mask=attention_mask,
            num_hashes=hashes,
            hidden_states=hidden_states,
            past_states=past,
            past_buckets=past_buckets,
        )
        tokens = tokens.flatten(2)  # (batch, heads, hashes * neighbours): which token each of the states is of
        dtype = compute_dtype(query)
        key = self._keys(module._query_per_attn_head(states)).to(dtype)
        value = module._value_per_attn_head(states).to(dtype)
        own = (tokens == past.shape[1])[:, :, None]
        itself = _rows(value, own[:, :, 0].long().argmax(-1, keepdim=True))
        segment = Segment(key, value, mask=~own)
        result = self._attend(self._attention(query.to(dtype), (segment,), itself), wanted)
        if result.dropped is None or result.probabilities is None:
            return result.output, None, buckets
        weights, kept, own = (
            tensor.unflatten(-1, (hashes, -1)).transpose(2, 3)
            for tensor in (result.probabilities[0], result.dropped[0], own)
        )
        return result.output, with_own_token(kept, weights.sum(-1, keepdim=True), own), buckets


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of ``(batch, heads, n, dim)`` by ``(batch, heads, m)`` indices."""
    return tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))


# --- for the registry


def _request(module: Any, *segments: SegmentRequest) -> Request:
    parameter, dim = parameter_of(module), module.attention_head_size
    return Request(parameter.device.type, parameter.dtype, module.num_attention_heads, dim, dim, segments)


def _local_requests(module: Any) -> tuple[Request, ...]:
    heads, chunk, causal = module.num_attention_heads, module.chunk_length, bool(module.is_decoder)
    chunks = Chunks(chunk, module.num_chunks_before, module.num_chunks_after, causal)
    patterns = (chunks, Causal(offset=0), Full()) if causal else (chunks, Full())
    return tuple(_request(module, SegmentRequest(pattern, heads, key_mask=True)) for pattern in patterns)


def _lsh_requests(module: Any) -> tuple[Request, ...]:
    heads, causal = module.num_attention_heads, bool(module.is_decoder)
    chunks = SortedChunks(module.chunk_length, module.num_chunks_before, module.num_chunks_after, causal)
    rounds = _request(module, *[SegmentRequest(chunks, heads)] * module.num_hashes)
    dense = _request(module, SegmentRequest(Full(), heads, key_mask=not causal, mask=True))
    if not causal:
        return rounds, dense
    return rounds, _request(module, SegmentRequest(Causal(offset=-1), heads, key_mask=True)), dense


def _describe(kind: str, module: Any) -> str:
    causal = ", causal" if module.is_decoder else ""
    return f"{kind} {module.chunk_length}, {module.num_chunks_before} before, {module.num_chunks_after} after{causal}"


def _dropout(module: Any) -> float:
    return float(module.dropout)


# The original functions this was verified against.
_AROUND = {
    f"{_MODULE}:EfficientAttentionMixin._look_adjacent": ("649e4214376ddabd",),
    f"{_MODULE}:EfficientAttentionMixin._split_hidden_size_dim": ("20e35e41e46d26d0",),
    f"{_MODULE}:EfficientAttentionMixin._split_seq_length_dim_to": ("f884d55ac5db194b",),
    f"{_MODULE}:EfficientAttentionMixin._merge_hidden_size_dims": ("7b957ebb2dc528db",),
    f"{_MODULE}:ReformerAttention.forward": ("94e32b9f88be1e8b",),
    f"{_MODULE}:ReformerLayer.backward_pass": ("88971bded9002311",),
}
_LOCAL = {
    **_AROUND,
    f"{_MODULE}:LocalSelfAttention.__init__": ("9fa9a07d6ac6f7c9",),
    f"{_MODULE}:LocalSelfAttention.forward": ("79e9bf8d4d7d639a",),
    f"{_MODULE}:LocalSelfAttention._compute_attn_mask": ("39e3a52f0a56b373",),
    f"{_MODULE}:LocalSelfAttention._retrieve_relevant_hidden_states": ("2709bd55558eeac7",),
}
_LSH = {
    **_AROUND,
    f"{_MODULE}:LSHSelfAttention.forward": ("41780baff1b70303",),
    f"{_MODULE}:LSHSelfAttention._query_per_attn_head": ("a5c60e418fec450d",),
    f"{_MODULE}:LSHSelfAttention._value_per_attn_head": ("af6f6fb9ffb9ab59",),
    f"{_MODULE}:LSHSelfAttention._hash_vectors": ("c769d91dda7dc95c",),
    f"{_MODULE}:LSHSelfAttention._get_sorted_bucket_idx_and_undo_sorted_bucket_idx": ("93c2685911ca8589",),
    f"{_MODULE}:LSHSelfAttention._set_num_buckets": ("c906de2c39fe3ebd",),
    f"{_MODULE}:LSHSelfAttention._attend": ("b1ad1a9339151072",),
    f"{_MODULE}:LSHSelfAttention._compute_attn_mask": ("a9f50ac34dc13ff2",),
    f"{_MODULE}:LSHSelfAttention._get_relevant_hid_states_and_buckets": ("e81225e2fc01370c",),
    f"{_MODULE}:LSHSelfAttention._expand_to_indices_in_relevant_chunk": ("fd19e4a85a1bc18f",),
    f"{_MODULE}:LSHSelfAttention._len_and_dim_norm": ("52be3245477bb6fd",),
    f"{_MODULE}:LSHSelfAttention._len_norm": ("b946b3d36f695202",),
    f"{_MODULE}:LSHSelfAttention._gather_by_expansion": ("1c67965cdfcc8296",),
    f"{_MODULE}:LSHSelfAttention.__init__": ("fcab90d91f6ee152",),
    f"{_MODULE}:_stable_argsort": ("f8dc6e26ca96f353",),
    f"{_MODULE}:ReverseSort.forward": ("bbc39b6fd0e98d2f",),
    f"{_MODULE}:ReverseSort.backward": ("2d592c85375659f0",),
}

REFORMER = Adapter(
    model_types=("reformer",),
    versions="5.17 to 5.23",
    seams=(
        Seam(
            cls=f"{_MODULE}:LocalSelfAttention",
            bind=_local_bind,
            describe=lambda module: _describe("chunks of", module),
            requests=_local_requests,
            dropout=_dropout,
            verified=_LOCAL,
        ),
        Seam(
            cls=f"{_MODULE}:LSHSelfAttention",
            bind=_LSHForward,
            describe=lambda module: _describe(f"LSH, {module.num_hashes} hashes, chunks of", module),
            requests=_lsh_requests,
            dropout=_dropout,
            verified=_LSH,
        ),
    ),
)
