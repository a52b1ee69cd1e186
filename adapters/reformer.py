"""Reformer: attention to chunks that are neighbours by position or hash (Kitaev et al. 2020, arXiv:2001.04451).

In local attention, a token sees its chunk and the neighbouring chunks. In LSH attention, queries and keys come from the
same projection. Each hash round hashes the tokens into buckets and sorts them by bucket. The sorted tokens of all
rounds form one list, which is split into chunks. This list contains a copy of each token for each round. In a round, a
token sees the chunk that contains its copy for this round, and the neighbouring chunks of the list, but not itself. If
a token sees no other token, its output is its own value. The adapter makes one segment per round, with the whole list
as keys, and computes one softmax over all segments. The original computes one softmax per round, and weights the
results by log-sum-exp, which gives the same output.

Decisions:

- Buckets. A patch calls the original hashing method of the module, so the patched module gets the same buckets from
  the same random numbers. If a call passes buckets, as reversible layers do in the backward, a patch uses them.
- ``num_buckets=None``. The original derives the number of buckets from the length of the first input, and writes the
  number into the module and the config. A patch stores the same number outside the module, so removing the patch
  restores everything. The original cannot decode a prompt that is shorter than a chunk, but a patch can.
- Memory. The original hashes and projects all tokens at once. A patch hashes long inputs in slices (``reformer_lsh``).
  Without gradients, local attention also computes the output in slices (``reformer_local``). The results are equal.
- Padding. The attention output is zero for padding queries, and for tokens of local attention that see no key.
- Visible keys when decoding with the cache. A token sees the same keys as in the original, which applies no causal
  mask here. ``generate`` passes no padding mask, so padding in the prompt is visible. The states of padding are
  undefined in the original, but zero with a patch. Like the original, a patch reads the cached states of the first
  sample for all samples.
- Projections when decoding with the cache. A patch calls the projection layers. The original only multiplies by the
  weights: hooks and low-rank adapters have no effect in the original, and quantised weights fail. With plain layers,
  the results of both are equal.
- ``output_attentions`` returns weights in the original layout: for each chunk of the list, the weights between its
  queries and the keys of the chunks that they see. The weights are normalised per round. If a token sees no other
  token, the returned weight of the token itself is 1. In training, dropout changes the output of such a token, but not
  this returned weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.adapter import Adapter, Attend, Forward, PatchPoint, request_for
from attnzoo.adapters.projections import is_plain
from attnzoo.adapters.reformer_layout import MODULE
from attnzoo.adapters.reformer_local import LocalCall
from attnzoo.adapters.reformer_lsh import BucketNumber, LshCall, window_ahead
from attnzoo.originals.fingerprint import object_at
from attnzoo.patching.companions import FeedForwardPoint
from attnzoo.patching.mask_arguments import ENCODER_MASK, MaskCheckPoint
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks
from attnzoo.spec.segments import Request, SegmentRequest


class ModelMasks(MaskCheckPoint):
    """Patch point that checks the attention mask of the model."""

    cls = f"{MODULE}:ReformerModel"
    masks = {"attention_mask": replace(ENCODER_MASK, cache=("past_buckets_states",))}


class FeedForward(FeedForwardPoint):
    """Patch point of the feed-forward layer."""

    cls = f"{MODULE}:ChunkReformerFeedForward"
    shared_in = f"{MODULE}:ReformerLayer"
    verified = {
        f"{MODULE}:ChunkReformerFeedForward.forward": ("194cb8fcf34372ba",),
        f"{MODULE}:ChunkReformerFeedForward.forward_chunk": ("d25d89dfa6ed0cf7",),
        f"{MODULE}:ReformerFeedForwardDense.forward": ("69f3eb2cfcc943a4",),
        f"{MODULE}:ReformerFeedForwardOutput.forward": ("1bf50c31d3a97c5d",),
    }

    def forward(self, module: Any, attend: Attend, attention_output: Tensor) -> Tensor:
        if module.chunk_size_feed_forward:  # the original forward already uses slices of this length
            output: Tensor = type(module).forward(module, attention_output)
            return output
        return super().forward(module, attend, attention_output)


# Fingerprints of the functions that both kinds of attention use.
_SHARED_FINGERPRINTS: dict[str, tuple[str, ...]] = {
    f"{MODULE}:EfficientAttentionMixin._look_adjacent": ("0a8d1c8e51f7a75b",),
    f"{MODULE}:EfficientAttentionMixin._split_hidden_size_dim": ("a7b4aa8fd9c088fa",),
    f"{MODULE}:EfficientAttentionMixin._split_seq_length_dim_to": ("fda5495e15b4f0fb",),
    f"{MODULE}:EfficientAttentionMixin._merge_hidden_size_dims": ("c1bc0d835c2edb3e",),
    f"{MODULE}:ReformerAttention.forward": ("791a1cd6b329e999",),
    f"{MODULE}:ReformerLayer.backward_pass": ("aeb3634253341e1c",),
}


class _Attention(PatchPoint):
    """Base class of the patch points of local and LSH attention."""

    backward_in_training = True
    cache = ("past_buckets_states",)

    def cached_tokens(self, module: Any, cache: Any) -> int:
        return int(cache.states_cache[module.layer_idx].shape[1]) if len(cache) > module.layer_idx else 0

    def dropout(self, module: Any) -> float:
        return float(module.dropout)


class LocalAttention(_Attention):
    """Patch point of attention to chunks that are neighbours in token order."""

    cls = f"{MODULE}:LocalSelfAttention"
    traceable = True
    verified = {
        **_SHARED_FINGERPRINTS,
        f"{MODULE}:LocalSelfAttention.__init__": ("a8d3d3bf6419f91d",),
        f"{MODULE}:LocalSelfAttention.forward": ("f4cd5d2b8f9a582a",),
        f"{MODULE}:LocalSelfAttention._compute_attn_mask": ("c9fa636953925706",),
        f"{MODULE}:LocalSelfAttention._retrieve_relevant_hidden_states": ("e65253d69019b769",),
    }

    def describe(self, module: Any) -> str:
        return f"chunks of {_describe_chunks(module)}"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, causal = module.num_attention_heads, bool(module.is_decoder)
        chunks = Chunks(module.chunk_length, module.num_chunks_before, module.num_chunks_after, causal)
        patterns: tuple[Pattern, ...] = (chunks, Causal(offset=0), Full()) if causal else (chunks, Full())
        return tuple(_request(module, SegmentRequest(pattern, heads, key_mask=True)) for pattern in patterns)

    def bind(self, cls: Any, attend: Attend) -> Forward:
        output = object_at(f"{MODULE}:LocalSelfAttentionOutput")
        return lambda module, *args, **kwargs: LocalCall(module, attend, output)(*args, **kwargs)


class LshAttention(_Attention):
    """Patch point of attention to chunks that are neighbours after sorting by hash bucket."""

    cls = f"{MODULE}:LSHSelfAttention"
    verified = {
        **_SHARED_FINGERPRINTS,
        f"{MODULE}:LSHSelfAttention.forward": ("14653f3f625da1b2",),
        f"{MODULE}:LSHSelfAttention._query_per_attn_head": ("ffe307b4450058e5",),
        f"{MODULE}:LSHSelfAttention._value_per_attn_head": ("e6a1ecc1e37e7ea4",),
        f"{MODULE}:LSHSelfAttention._hash_vectors": ("565ccb6875392979",),
        f"{MODULE}:LSHSelfAttention._get_sorted_bucket_idx_and_undo_sorted_bucket_idx": ("52688884aa91591d",),
        f"{MODULE}:LSHSelfAttention._set_num_buckets": ("91251d3091e21325",),
        f"{MODULE}:LSHSelfAttention._attend": ("07e6bad3ab1705f3",),
        f"{MODULE}:LSHSelfAttention._compute_attn_mask": ("d12b75688046fa6a",),
        f"{MODULE}:LSHSelfAttention._get_relevant_hid_states_and_buckets": ("6358bcd3233fcb26",),
        f"{MODULE}:LSHSelfAttention._expand_to_indices_in_relevant_chunk": ("9d48f0c8bc7e1bd3",),
        f"{MODULE}:LSHSelfAttention._len_and_dim_norm": ("7eb3b236c95766d7",),
        f"{MODULE}:LSHSelfAttention._len_norm": ("923fd29d98e79b70",),
        f"{MODULE}:LSHSelfAttention._gather_by_expansion": ("d203df638b10c727",),
        f"{MODULE}:LSHSelfAttention.__init__": ("865413fcd5efcffa",),
        f"{MODULE}:_stable_argsort": ("59c484d9f92e0fed",),
        f"{MODULE}:ReverseSort.forward": ("976869d29332670c",),
        f"{MODULE}:ReverseSort.backward": ("8994d4915a22b6bb",),
    }
    makes_random_choices = True

    def original_serves(self, module: Any, *args: Any, past_buckets_states: Any = None, **kwargs: Any) -> bool:
        # The original would write the number of buckets into the config. When decoding with the cache, the original
        # multiplies by the weights and ignores hooks and wrappers of the projections.
        if module.num_buckets is None:
            return False
        decodes = past_buckets_states is not None and len(past_buckets_states) > module.layer_idx
        return not decodes or (is_plain(module.query_key) and is_plain(module.value))

    def describe(self, module: Any) -> str:
        return f"LSH, {module.num_hashes} hashes, chunks of {_describe_chunks(module)}"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, causal = module.num_attention_heads, bool(module.is_decoder)
        chunks = SortedChunks(module.chunk_length, module.num_chunks_before, module.num_chunks_after, causal)
        rounds = _request(module, *[SegmentRequest(chunks, heads)] * module.num_hashes)
        patterns: tuple[Pattern, ...] = (Causal(offset=-1),) if causal else (Causal(offset=-1), window_ahead(module))
        short = _request(module, *(SegmentRequest(pattern, heads, key_mask=True) for pattern in patterns))
        if not causal:
            return rounds, short
        decoding = replace(_request(module, SegmentRequest(Full(), 1, key_mask=True)), heads=1)
        return rounds, short, _request(module, SegmentRequest(Full(), heads)), decoding

    def replay(self, output: Any) -> dict[str, Any]:
        return {} if output.buckets is None else {"buckets": output.buckets}

    def bind(self, cls: Any, attend: Attend) -> Forward:
        number = BucketNumber()
        return lambda module, *args, **kwargs: LshCall(module, attend, number)(*args, **kwargs)


def _describe_chunks(module: Any) -> str:
    causal = ", causal" if module.is_decoder else ""
    return f"{module.chunk_length}, {module.num_chunks_before} before, {module.num_chunks_after} after{causal}"


def _request(module: Any, *segments: SegmentRequest) -> Request:
    return request_for(module, module.num_attention_heads, module.attention_head_size, *segments)


REFORMER = Adapter(
    model_types=("reformer",),
    versions="5.17 to 5.24",
    examples=({"is_decoder": True, "num_hashes": 4}, {"is_decoder": False, "num_hashes": 4}),
    points=(ModelMasks(), LocalAttention(), LshAttention(), FeedForward()),
)
