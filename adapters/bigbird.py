"""BigBird and BigBird-Pegasus: block-sparse attention with random blocks (Zaheer et al. 2020, arXiv:2007.14062).

A token sees the tokens of its block and of both neighbouring blocks, the first and the last block, and some random
blocks. The tokens of the first and of the last block see all tokens. The attention has no dropout. A token that two of
these sets contain is in the softmax twice.

In training, the code of the model draws the random blocks, after it has set the seed of numpy to the index of the
layer. A patch calls the same code. In evaluation, every random block is the first block. So a token of the first block
is in the softmax ``1 + num_random_blocks`` times, which a patch computes as a bias of ``log(1 + num_random_blocks)``.

If an input is too short for block-sparse attention, the model replaces the attention modules inside
``BigBirdAttention`` by modules with full attention. So the patch points are the modules around them, which stay. The
decoder of BigBird, with its cache, has full attention, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, PatchPoint, request_for
from attnzoo.adapters import pegasus_x
from attnzoo.errors import InvalidArgumentError, PatchError
from attnzoo.originals.fingerprint import path_of
from attnzoo.patching.interface import attend_read
from attnzoo.patching.mask_arguments import (
    CROSS_MASK,
    DECODER_MASK,
    DECODER_MASKS,
    ENCODER_MASK,
    MaskArguments,
    MaskCheckPoint,
)
from attnzoo.spec.autocast import active_autocast
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.masks import NO_MASK, read_attention_mask
from attnzoo.spec.patterns import Causal, Chunks, Full
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import hides_nothing, holds

VERSIONS = "5.17 to 5.24"
_BIG_BIRD = "transformers.models.big_bird.modeling_big_bird"
_PEGASUS = "transformers.models.bigbird_pegasus.modeling_bigbird_pegasus"
_PLANNED_LENGTHS = (1024, 3072, 4096)  # the code of the model draws the blocks for these lengths in another way
Weights = Tensor | None


def _verified(prefix: str) -> dict[str, tuple[str, ...]]:
    """Return the fingerprints of the two modules that both models have copies of."""
    sparse = f"{prefix}BlockSparseAttention"
    return {
        f"{prefix}SelfAttention.forward": ("004a1c0feccfd98f", "3320f3999dfd1018"),
        f"{sparse}.forward": ("1441495cf52d3dea",),
        f"{sparse}.bigbird_block_sparse_attention": ("298ea047739d0711", "d476709d240f517d"),
        f"{sparse}._create_rand_mask_from_inputs": ("35d07182f054969e",),
        f"{sparse}._bigbird_block_rand_mask": ("9ba501b0815a8199",),
        f"{sparse}._bigbird_block_rand_mask_with_head": ("12358818c3df55e9",),
        f"{sparse}._get_rand_attn_plan": ("66146be4d55e104c",),
        f"{sparse}._get_single_block_row_attention": ("4b84458d4bec9b34",),
    }


class ModelMasks(MaskCheckPoint):
    """Patch point that checks the masks of BigBird, which is an encoder or a decoder."""

    cls = f"{_BIG_BIRD}:BigBirdModel"

    def masks_of(self, module: Any) -> MaskArguments:
        if module.config.is_decoder:
            return {"attention_mask": DECODER_MASK, "encoder_attention_mask": CROSS_MASK}
        # With BigBirdForCausalLM, generation passes a cache to an encoder, too.
        is_full = module.attention_type == "original_full"
        return {"attention_mask": replace(ENCODER_MASK, allows_grid=is_full, cache=DECODER_MASK.cache, subtracted=True)}


class EncoderMasks(MaskCheckPoint):
    """Patch point that checks the mask of BigBird-Pegasus's encoder."""

    cls = f"{_PEGASUS}:BigBirdPegasusEncoder"
    masks = {"attention_mask": ENCODER_MASK}


class DecoderMasks(MaskCheckPoint):
    """Patch point that checks the masks of BigBird-Pegasus's decoder."""

    cls = f"{_PEGASUS}:BigBirdPegasusDecoder"
    masks = DECODER_MASKS


class AnyAttention(PatchPoint):
    """Patch point of BigBird's attention, block-sparse or full, together with the output layer."""

    cls = f"{_BIG_BIRD}:BigBirdAttention"
    verified = {
        **_verified(f"{_BIG_BIRD}:BigBird"),
        f"{_BIG_BIRD}:BigBirdAttention.forward": ("2fa582f64add2454", "0c6ce7ce82f4288e"),
        f"{_BIG_BIRD}:BigBirdAttention.set_attention_type": ("e8e03a6e6380bac6",),
        f"{_BIG_BIRD}:BigBirdLayer.forward": ("ca40a4f5904633fc", "e69b889a14ee5db0"),
        f"{_BIG_BIRD}:BigBirdModel.forward": (
            *("8a31472e4b58995d", "fac49d0439cb924e", "6e5bf74dc378c745", "ab5e20cec8699b6d"),
        ),
        f"{_BIG_BIRD}:BigBirdModel.create_masks_for_block_sparse_attn": ("b532962f2d2e3544",),
    }
    inner = (f"{_BIG_BIRD}:BigBirdSelfAttention", f"{_BIG_BIRD}:BigBirdBlockSparseAttention")

    def describe(self, module: Any) -> str:
        inner = module.self
        if not _is_sparse(module):
            return "masked (self or cross)"
        return f"blocks of {inner.block_size} + first, last and {inner.num_random_blocks} random"

    def requests(self, module: Any) -> tuple[Request, ...]:
        inner = module.self
        heads, dim = inner.num_attention_heads, inner.attention_head_size
        # A module with block-sparse attention computes full attention after a short input.
        patterns = (Full(), Causal(offset=0), Full(cross=True)) if module.config.is_decoder else (Full(),)
        full = [request_for(module, heads, dim, SegmentRequest(pattern, heads, key_mask=True)) for pattern in patterns]
        if not _is_sparse(module):
            return tuple(full)
        bias = RelativeBias.kind if _copies_of_the_first_block(inner) > 1 else None
        segments = [
            SegmentRequest(_near(inner), heads, key_mask=True),
            SegmentRequest(Full(), heads, key_mask=True, bias=bias),
            SegmentRequest(Full(), heads, key_mask=True),
        ]
        if _draws_blocks(inner):
            segments.append(SegmentRequest(ChosenBlocks(inner.block_size), heads, key_mask=True))
        return request_for(module, heads, dim, *segments), *full

    def original_serves(self, module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> bool:
        # Under autocast, block-sparse attention may scatter weights of one dtype into a tensor of another, and raise.
        return not _is_sparse(module) or active_autocast(hidden_states.device.type) is None

    def mode(self, module: Any) -> object:
        return module.self.training, module.attention_type

    def dropout(self, module: Any) -> float:
        return 0.0 if _is_sparse(module) else float(module.self.dropout.p)

    def check(self, module: Any) -> None:
        if path_of(type(module.self)) not in self.inner:
            names = " or ".join(path.rpartition(":")[2] for path in self.inner)
            raise PatchError(f"{type(module).__name__}.self: got {type(module.self).__name__}; allowed: {names}")

    def wants_probabilities(self, module: Any, kwargs: Mapping[str, Any]) -> bool:
        keyword = kwargs.get("output_attentions")
        return bool(module.config.output_attentions if keyword is None else keyword)

    def forward(
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Weights]:
        """Return states ``(batch, length, embed)`` and, if requested, the weights of all queries and keys.

        Full attention reads ``attention_mask`` or, with ``encoder_hidden_states``, the mask of these states.
        Block-sparse attention reads ``to_mask`` ``(batch, 1, 1, length)``. The model makes the other masks from the
        same tokens.
        """
        cache = past_key_values if cache is None else cache  # the name before transformers 5.24
        wanted = self.wants_probabilities(module, kwargs)

        def compute(states: Tensor) -> tuple[Tensor, Weights]:
            if _is_sparse(module):
                if encoder_hidden_states is not None:
                    raise InvalidArgumentError(
                        "encoder_hidden_states", describe(encoder_hidden_states), "None with block-sparse attention"
                    )
                return _attend_to_blocks(module.self, attend, states, to_mask, wanted)
            is_cross = encoder_hidden_states is not None
            mask = encoder_attention_mask if is_cross else attention_mask
            return _attend_to_all(module.self, attend, states, encoder_hidden_states, mask, cache, wanted)

        context, weights = _run_inner(module.self, hidden_states, compute)
        return self.output_of(module, context, hidden_states), weights

    def output_of(self, module: Any, context: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the states after the output layer of the module."""
        output: Tensor = module.output(context, hidden_states)
        return output


class PegasusEncoderAttention(AnyAttention):
    """Patch point of the encoder's attention of BigBird-Pegasus."""

    cls = f"{_PEGASUS}:BigBirdPegasusEncoderAttention"
    verified = {
        **_verified(f"{_PEGASUS}:BigBirdPegasus"),
        f"{_PEGASUS}:BigBirdPegasusEncoderAttention.forward": ("daa92fee823563f5",),
        f"{_PEGASUS}:BigBirdPegasusEncoderAttention.set_attention_type": ("be74a8f36f857795",),
        f"{_PEGASUS}:BigBirdPegasusEncoderLayer.forward": ("e2a103af2b81fd09",),
        f"{_PEGASUS}:BigBirdPegasusEncoder.forward": ("d43cc01f667f7020", "cc5b17f05f14f3d5"),
        f"{_PEGASUS}:BigBirdPegasusEncoder.create_masks_for_block_sparse_attn": ("b532962f2d2e3544",),
    }
    inner = (f"{_PEGASUS}:BigBirdPegasusSelfAttention", f"{_PEGASUS}:BigBirdPegasusBlockSparseAttention")

    def forward(  # type: ignore[override]
        self,
        module: Any,
        attend: Attend,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Weights]:
        """Return states and weights as :class:`AnyAttention` does."""
        return super().forward(module, attend, hidden_states, attention_mask, to_mask=to_mask, **kwargs)

    def output_of(self, module: Any, context: Tensor, hidden_states: Tensor) -> Tensor:
        output: Tensor = module.output(context)
        return output


class PegasusDecoderAttention(pegasus_x.DecoderAttention):
    """Patch point of the decoder's attention of BigBird-Pegasus, which is that of Pegasus-X."""

    cls = f"{_PEGASUS}:BigBirdPegasusDecoderAttention"
    verified = {
        f"{_PEGASUS}:BigBirdPegasusDecoderAttention.forward": ("c6468db57b98c0ae", "249281d082b62122"),
        f"{_PEGASUS}:BigBirdPegasusDecoder.forward": ("272a144b2d39ae74", "d0a0b65786912e39", "962e6e6ab647f141"),
        f"{_PEGASUS}:BigBirdPegasusDecoderLayer.forward": ("2713298c1b968a23", "bb9b407278791ca4"),
        f"{_PEGASUS}:eager_attention_forward": ("a1c8f529c890fa16",),
    }


def _is_sparse(module: Any) -> bool:
    return bool(module.attention_type == "block_sparse")


def _near(inner: Any) -> Chunks:
    return Chunks(inner.block_size, before=1, after=1)


def _draws_blocks(inner: Any) -> bool:
    return bool(inner.training and inner.num_random_blocks)


def _copies_of_the_first_block(inner: Any) -> int:
    return 1 if inner.training else 1 + int(inner.num_random_blocks)


def _run_inner(
    inner: Any, hidden_states: Tensor, compute: Callable[[Tensor], tuple[Tensor, Weights]]
) -> tuple[Tensor, Weights]:
    """Call ``compute`` as the forward of a shallow copy of the inner module, whose hooks then run.

    transformers collects attention weights by such hooks. A hook gets the copy, and the hidden states as the only
    argument. The inner module itself stays unchanged for other threads.
    """
    twin = copy.copy(inner)
    twin.forward = compute
    result: tuple[Tensor, Weights] = twin(hidden_states)
    return result


def _attend_to_all(
    inner: Any, attend: Attend, states: Tensor, encoder_states: Tensor | None, mask: Any, cache: Any, wanted: bool
) -> tuple[Tensor, Weights]:
    """Compute full attention. Return ``(batch, length, embed)`` and the weights."""
    is_cross = encoder_states is not None
    dim, source = inner.attention_head_size, states if encoder_states is None else encoder_states
    query = split_heads(inner.query(states), dim)
    if is_cross and cache is not None and cache.get_seq_length(inner.layer_idx) > 0:
        key, value = cache.layers[inner.layer_idx].keys, cache.layers[inner.layer_idx].values
    else:
        key, value = (split_heads(project(source), dim) for project in (inner.key, inner.value))
        if cache is not None:
            key, value = cache.update(key, value, inner.layer_idx)
    read, sizes = NO_MASK, (query.shape[0], query.shape[2], key.shape[2])
    if mask is not None:
        read = attend.cached_per_forward(mask, "read", lambda given: read_attention_mask(given, sizes))
    if isinstance(read.pattern, Full):
        read = read._replace(pattern=Full(is_cross))
    dropout = inner.dropout.p if inner.dropout.training else 0.0
    output, weights = attend_read(attend, read, query, key, value, dim**-0.5, dropout, wanted)
    return output.flatten(2), weights


def _attend_to_blocks(
    inner: Any, attend: Attend, states: Tensor, to_mask: Tensor | None, wanted: bool
) -> tuple[Tensor, Weights]:
    """Compute block-sparse attention. Return ``(batch, length, embed)`` and the weights."""
    batch, length, _ = states.shape
    block, dim, heads = inner.block_size, inner.attention_head_size, inner.num_attention_heads
    if length % block:
        raise InvalidArgumentError("hidden_states", f"{length} tokens", f"a multiple of the block size {block}")
    if not isinstance(to_mask, Tensor) or tuple(to_mask.shape) != (batch, 1, 1, length):
        raise InvalidArgumentError("to_mask", describe(to_mask), f"shape {(batch, 1, 1, length)}, as from the model")
    real = attend.cached_per_forward(to_mask, "real", _real)
    ordinary = attend.cached_per_forward(to_mask, f"ordinary tokens, {block}", lambda mask: _ordinary(mask, block))
    query, key, value = (split_heads(project(states), dim) for project in (inner.query, inner.key, inner.value))
    copies, bias = _copies_of_the_first_block(inner), None
    if copies > 1:
        # A bias in half precision would be off by more than a rounding of the weights.
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        bias = RelativeBias(torch.full((1, 1), math.log(copies), dtype=dtype, device=query.device), zero=0)
    first, last = slice(0, block), slice(length - block, length)
    segments = [Segment(key, value, _near(inner), key_mask=ordinary)]
    for part, of_part in ((first, bias), (last, None)):
        visible = None if real is None else real[:, part]
        segments.append(Segment(key[:, :, part], value[:, :, part], key_mask=visible, bias=of_part))
    if _draws_blocks(inner):
        chosen = _draw_blocks(inner, length).to(query.device).expand(batch, heads, -1, -1)
        segments.append(Segment(key, value, ChosenBlocks(block, chosen), key_mask=real))
    near = attend(Attention(query, tuple(segments), dim**-0.5, query_mask=real), wanted)
    ends = torch.cat([query[:, :, first], query[:, :, last]], dim=2)
    real_ends = None if real is None else torch.cat([real[:, first], real[:, last]], dim=1)
    everything = Segment(key, value, key_mask=real)
    wide = attend(Attention(ends, (everything,), dim**-0.5, query_mask=real_ends), wanted)
    output = merge_heads(_with_ends(near.output, wide.output, block))
    if near.dropped is None or wide.dropped is None:
        return output, None
    # As in the original, the weight of a token is that of one of its copies.
    of_near, of_first, of_last, *of_chosen = near.dropped
    rows = torch.cat([of_first / copies, of_near[..., block:-block], of_last], dim=-1)
    for weights in of_chosen:
        rows = torch.maximum(rows, weights)
    return output, _with_ends(rows, wide.dropped[0], block)


def _with_ends(rows: Tensor, ends: Tensor, block: int) -> Tensor:
    """Replace the first and the last block of ``rows`` ``(batch, heads, length, n)`` by the two blocks ``ends``."""
    return torch.cat([ends[:, :, :block], rows[:, :, block:-block], ends[:, :, block:]], dim=2)


def _real(to_mask: Tensor) -> Tensor | None:
    """Return bool ``(batch, length)``, True for tokens, or None if there is no padding."""
    mask = to_mask[:, 0, 0]
    if not holds(((mask == 0) | (mask == 1)).all(), unknown=True):
        raise InvalidArgumentError(
            "attention_mask", f"{describe(mask)}, with other values", "1 for tokens, 0 for padding"
        )
    real = mask == 1
    return None if hides_nothing(real) else real


def _ordinary(to_mask: Tensor, block: int) -> Tensor:
    """Return bool ``(batch, length)``, True for tokens outside the first and the last block."""
    ordinary = to_mask[:, 0, 0] == 1
    position = torch.arange(ordinary.shape[1], device=ordinary.device)
    return ordinary & (position >= block) & (position < ordinary.shape[1] - block)


def _draw_blocks(inner: Any, length: int) -> Tensor:
    """Return the random blocks ``(heads, blocks, n)``, -1 for the first and the last block of queries.

    The blocks and the state of numpy's random numbers are those of the original. In a list, no block is repeated.
    """
    block, number, heads = inner.block_size, inner.num_random_blocks, inner.num_attention_heads
    np.random.seed(inner.seed)
    if length in _PLANNED_LENGTHS:
        most, middle = inner.max_seqlen, length // block - 2
        lists = [inner._bigbird_block_rand_mask(most, most, block, block, number, last_idx=1024) for _ in range(heads)]
        drawn = np.stack([blocks[:middle] for blocks in lists])
    else:
        plan, numbers = inner._get_rand_attn_plan(length, block, number)
        drawn = np.stack(inner._bigbird_block_rand_mask_with_head(length, length, block, block, heads, plan, numbers))
    return torch.nn.functional.pad(torch.as_tensor(drawn, dtype=torch.long), (0, 0, 1, 1), value=-1)


BIG_BIRD = Adapter(
    model_types=("big_bird",),
    versions=VERSIONS,
    points=(AnyAttention(), ModelMasks()),
    examples=({}, {"attention_type": "original_full"}),
)
BIGBIRD_PEGASUS = Adapter(
    model_types=("bigbird_pegasus",),
    versions=VERSIONS,
    points=(PegasusEncoderAttention(), EncoderMasks(), DecoderMasks(), PegasusDecoderAttention()),
)
