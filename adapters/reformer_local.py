"""Reformer's local attention: each chunk sees its neighbours. The module ``reformer`` explains the decisions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend
from attnzoo.adapters.reformer_layout import (
    cached,
    check_length,
    in_chunks,
    neighbourhoods,
    real_tokens,
    steps_ahead,
)
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import compute_dtype
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern
from attnzoo.spec.segments import Attention, Result, Segment

# A slice has at least about SLICE tokens. For each slice, the keys and values of the chunks next to the slice are
# computed again. So a slice has at least SLICE_PER_NEIGHBOURHOOD times as many tokens as these chunks.
SLICE, SLICE_PER_NEIGHBOURHOOD = 2048, 8


class LocalCall:
    """The patched forward of a local attention module. Each call of the module makes one object."""

    def __init__(self, module: Any, attend: Attend, output: Callable[..., tuple[Tensor, Any]]) -> None:
        self._module, self._attend, self._output = module, attend, output

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_buckets_states: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        num_hashes: int | None = None,
        buckets: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Return states ``(batch, length, embed)``, and weights if requested.

        As in the original, ``num_hashes`` and ``buckets`` have no effect.
        """
        module, wanted = self._module, bool(output_attentions)
        batch, length, _ = hidden_states.shape
        chunk, causal = module.chunk_length, bool(module.is_decoder)
        states = hidden_states
        past = cached(module, past_buckets_states, batch)
        if past is not None:
            relevant = module._retrieve_relevant_hidden_states(past[1], chunk, module.num_chunks_before)
            states = torch.cat([relevant, hidden_states], dim=1)
            if length > (1 if causal else chunk):
                raise InvalidArgumentError("hidden_states", f"{length} tokens with a filled cache", "1 token per call")
        # With a filled cache, the mask may have only one column: the new token.
        is_step = isinstance(attention_mask, Tensor) and attention_mask.shape[1:] == (1,)
        real = real_tokens(self._attend, attention_mask, batch, 1 if is_step else states.shape[1])
        real = None if real is None else real.expand(-1, states.shape[1])
        weights: Any = ()
        if length <= chunk:
            pattern = Causal(offset=0) if causal and states.shape[1] == length else Full()
            result = self._run(hidden_states, states, real, (pattern,), wanted)
            weights = () if result.dropped is None else result.dropped[0]
            output = merge_heads(result.output)
        elif (size := self._slice_length(hidden_states, wanted)) is not None:
            output = self._in_slices(states, real, size)
        else:
            count = check_length(module, length)
            chunks = tuple(Chunks(chunk, *sides, causal=causal) for sides in neighbourhoods(module, count))
            result = self._run(states, states, real, chunks, wanted)
            weights = () if result.dropped is None else in_chunks(result.dropped, chunk, steps_ahead(module, count))
            output = merge_heads(result.output)
        return self._output(output, weights)

    def _run(
        self, states: Tensor, around: Tensor, real: Tensor | None, patterns: tuple[Pattern, ...], wanted: bool = False
    ) -> Result:
        """Compute attention with queries from ``states``, keys and values from ``around``, and key mask ``real``."""
        module = self._module
        dim = module.attention_head_size
        query = split_heads(module.query(states), dim)
        key, value = (split_heads(project(around), dim) for project in (module.key, module.value))
        query, key, value = (tensor.to(compute_dtype(query)) for tensor in (query, key, value))
        segments = tuple(Segment(key, value, pattern, key_mask=real) for pattern in patterns)
        query_mask = real if around.shape[1] == states.shape[1] else None
        dropout = module.dropout if module.training else 0.0
        return self._attend(Attention(query, segments, 1.0 / math.sqrt(dim), dropout, query_mask), wanted)

    def _slice_length(self, states: Tensor, wanted: bool) -> int | None:
        """Return the number of tokens per slice, or None to compute all tokens at once.

        Only the CPU computes slices. On a GPU, the launches of many small kernels take longer than the kernels.

        Slices must not change results. So there are no slices if gradients, dropout or probabilities are needed. A
        graph of ``torch.compile`` has no slices, because another number of slices would need another graph. There
        are also no slices for causal attention with ``num_chunks_after > 0``, where the last chunk sees the first chunk
        as the chunk after it. The causal pattern does not hide the first chunk, because its positions are earlier. In
        a slice, the first chunk would come after the last chunk, so the causal pattern would hide it.
        """
        module, length = self._module, states.shape[1]
        around = module.num_chunks_before + module.num_chunks_after
        size = module.chunk_length * max(SLICE // module.chunk_length, SLICE_PER_NEIGHBOURHOOD * around, 1)
        plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training or wanted)
        ends = bool(module.is_decoder) and module.num_chunks_after > 0
        return size if states.device.type == "cpu" and plain and not ends and length >= 2 * size else None

    def _in_slices(self, states: Tensor, real: Tensor | None, size: int) -> Tensor:
        """Return the output ``(batch, length, embed)``, computed in slices.

        Slices save memory, because queries, keys and values of all tokens are three times as large as the output. Each
        slice is computed together with the chunks around it, and the output of these chunks is discarded. The result
        is correct only if the projections treat each token independently of the other tokens.
        """
        module, length = self._module, states.shape[1]
        check_length(module, length)
        chunk, causal = module.chunk_length, bool(module.is_decoder)
        before, after = module.num_chunks_before, module.num_chunks_after
        output: Tensor | None = None
        for start in range(0, length, size):
            stop = min(start + size, length)
            # Without a causal mask, the first chunks also see the last chunks.
            first, last = start - before * chunk, stop + after * chunk
            first = max(0, first) if causal else first
            part = _around(states, first, last)
            part_real = None if real is None else _around(real, first, last)
            result = self._run(part, part, part_real, (Chunks(chunk, before, after, causal),))
            merged = merge_heads(result.output)[:, start - first : stop - first]
            if output is None:
                output = merged.new_empty((merged.shape[0], length, merged.shape[2]))
            output[:, start:stop] = merged
        return torch.as_tensor(output)


def _around(tensor: Tensor, first: int, last: int) -> Tensor:
    """Return tokens ``first:last`` of ``(batch, length, ...)``. Index -1 is the last token, ``length`` is token 0."""
    parts = [tensor[:, max(0, first) : last]]
    if first < 0:
        parts.insert(0, tensor[:, first:])
    if last > tensor.shape[1]:
        parts.append(tensor[:, : last - tensor.shape[1]])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
