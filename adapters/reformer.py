"""Reformer: attention within chunks, of neighbours by position or by hash (Kitaev et al. 2020, arXiv:2001.04451).

Local attention looks at the chunks around a token's own. LSH attention hashes queries, which are also the keys, into
buckets, several times over; sorts the tokens of all rounds into one list; and looks at the chunks around each copy's
own in that list. A token does not see itself, unless it sees nothing else: then it gets its own value. Rounds are
segments on the same sorted keys, under one softmax, which is what the model's weights by log-sum-exp amount to.

Decisions:

- Buckets. The module hashes by its own method, so that rotations, buckets and the use of the random stream are the
  model's; buckets handed in (the reversible layers hand in theirs on the way back) are used as they are.
- ``num_buckets=None``. The model derives a number from the first input it sees and writes it into the module and the
  config. Under a patch the same number is derived, and the patch remembers it; module and config keep their None, so
  that removing the patch leaves nothing behind. Where the model fails for lack of a number (decoding from a prompt
  shorter than a chunk), one is derived from the length at which it is first needed.
- Memory. The model rotates all queries at once to hash them, and projects all tokens at once. Long inputs are hashed
  slice by slice (``reformer_lsh``), and local attention without gradients goes from the hidden states to the output
  slice by slice (``reformer_local``): what the model computes, less of it at a time.
- Padding. Padding queries get zeros, and so do tokens of local attention that see nothing.
- Decoding with the cache shows a token what the model shows it, without causal or padding mask: with several samples,
  the model looks up the cached states of the first for all of them, and so do we. So a token sees the padding of its
  prompt, too, where a call had one (``generate`` hands no mask on): zeros went into it, where the model has leftovers.
- Decoding with the cache calls the projections. The model multiplies by their weights there, so that it ignores hooks
  and low-rank adapters, and fails on quantised weights; a plain linear layer gives the same either way.
- ``output_attentions`` in training gives tokens that see only themselves their whole weight, dropped or not.
- ``output_attentions`` gives the layout of the model: weights within each chunk's neighbourhood, in sorted order,
  normalised per round.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, bind_function, parameter_of
from attnzoo.adapters.reformer_layout import MODULE
from attnzoo.adapters.reformer_local import forward_local
from attnzoo.adapters.reformer_lsh import after_itself, bind_lsh
from attnzoo.patching.companions import by_slices, companion
from attnzoo.patching.mask_arguments import ENCODER_MASK, checking
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks
from attnzoo.spec.segments import Request, SegmentRequest


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
    patterns = (Causal(offset=-1), *(() if causal else (after_itself(module),)))
    short = _request(module, *(SegmentRequest(pattern, heads, key_mask=True) for pattern in patterns))
    if not causal:
        return rounds, short
    decoding = replace(_request(module, SegmentRequest(Full(), 1, key_mask=True)), heads=1)
    return rounds, short, _request(module, SegmentRequest(Full(), heads)), decoding


def _describe(kind: str, module: Any) -> str:
    causal = ", causal" if module.is_decoder else ""
    return f"{kind} {module.chunk_length}, {module.num_chunks_before} before, {module.num_chunks_after} after{causal}"


def _dropout(module: Any) -> float:
    return float(module.dropout)


# The original functions this was verified against.
_AROUND = {
    f"{MODULE}:EfficientAttentionMixin._look_adjacent": ("0a8d1c8e51f7a75b",),
    f"{MODULE}:EfficientAttentionMixin._split_hidden_size_dim": ("a7b4aa8fd9c088fa",),
    f"{MODULE}:EfficientAttentionMixin._split_seq_length_dim_to": ("fda5495e15b4f0fb",),
    f"{MODULE}:EfficientAttentionMixin._merge_hidden_size_dims": ("c1bc0d835c2edb3e",),
    f"{MODULE}:ReformerAttention.forward": ("791a1cd6b329e999",),
    f"{MODULE}:ReformerLayer.backward_pass": ("aeb3634253341e1c",),
}
_LOCAL = {
    **_AROUND,
    f"{MODULE}:LocalSelfAttention.__init__": ("a8d3d3bf6419f91d",),
    f"{MODULE}:LocalSelfAttention.forward": ("f4cd5d2b8f9a582a",),
    f"{MODULE}:LocalSelfAttention._compute_attn_mask": ("c9fa636953925706",),
    f"{MODULE}:LocalSelfAttention._retrieve_relevant_hidden_states": ("e65253d69019b769",),
}
_LSH = {
    **_AROUND,
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

_FEED_FORWARD = {
    f"{MODULE}:ChunkReformerFeedForward.forward": ("194cb8fcf34372ba",),
    f"{MODULE}:ChunkReformerFeedForward.forward_chunk": ("d25d89dfa6ed0cf7",),
    f"{MODULE}:ReformerFeedForwardDense.forward": ("69f3eb2cfcc943a4",),
    f"{MODULE}:ReformerFeedForwardOutput.forward": ("1bf50c31d3a97c5d",),
}


def _feed_forward(module: Any, attend: Attend, attention_output: Tensor) -> Tensor:
    """Slice by slice, unless ``config.chunk_size_feed_forward`` says how long the model's own slices are."""
    if module.chunk_size_feed_forward:
        output: Tensor = type(module).forward(module, attention_output)
        return output
    return by_slices(module, attend, attention_output)


REFORMER = Adapter(
    model_types=("reformer",),
    versions="5.17 to 5.23",
    examples=({"is_decoder": True, "num_hashes": 4}, {"is_decoder": False, "num_hashes": 4}),
    points=(
        companion(
            f"{MODULE}:ReformerModel",
            checking(lambda module: {"attention_mask": replace(ENCODER_MASK, cache=("past_buckets_states",))}),
            {},
            "checks masks",
        ),
        PatchPoint(
            cls=f"{MODULE}:LocalSelfAttention",
            bind=bind_function(forward_local),
            describe=lambda module: _describe("chunks of", module),
            requests=_local_requests,
            dropout=_dropout,
            backward_in_training=True,
            verified=_LOCAL,
        ),
        PatchPoint(
            cls=f"{MODULE}:LSHSelfAttention",
            bind=bind_lsh,
            describe=lambda module: _describe(f"LSH, {module.num_hashes} hashes, chunks of", module),
            requests=_lsh_requests,
            dropout=_dropout,
            replay=lambda output: {} if output.buckets is None else {"buckets": output.buckets},
            backward_in_training=True,
            verified=_LSH,
        ),
        companion(
            f"{MODULE}:ChunkReformerFeedForward",
            bind_function(_feed_forward),
            _FEED_FORWARD,
            "feeds forward slice by slice",
            shared_in=f"{MODULE}:ReformerLayer",
        ),
    ),
)
