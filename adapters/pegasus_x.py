"""Pegasus-X (Phang et al. 2022, arXiv:2208.04347): blocks of tokens, and global tokens beside the sequence.

A token of the encoder sees the tokens of its block and all global tokens. A global token sees all global tokens and all
tokens. The global tokens have embeddings and states, but no places in the sequence. Padding queries see the global
tokens, too, and have the same outputs as in the original. Every second layer shifts its blocks: the layer pads the
sequence with half a block on each side, calls the attention, and removes the padding. So the attention has the same
pattern in all layers.

The decoder uses causal self-attention and cross-attention through transformers' ``AttentionInterface``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Adapter, Attend, Forward, PatchPoint, request_for
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.interface import InterfacePoint, attend_read, read_interface_mask
from attnzoo.patching.mask_arguments import DECODER_MASKS, ENCODER_MASK, MaskCheckPoint, check_mask
from attnzoo.spec.heads import merge_heads, split_heads
from attnzoo.spec.patterns import Causal, Chunks, Full
from attnzoo.spec.segments import Attention, Request, Segment, SegmentRequest, describe
from attnzoo.spec.transforms import hides_nothing, holds

_MODULE = "transformers.models.pegasus_x.modeling_pegasus_x"


class EncoderMasks(MaskCheckPoint):
    """Patch point that checks the mask of the encoder, and that tells the layers whether weights are requested.

    The attention modules have no config. In the original, they always return weights, and the encoder keeps the weights
    if its keyword ``output_attentions`` or its config requests them. The encoder passes keywords on to the attention,
    so the patched encoder turns a request of the config into the keyword.
    """

    cls = f"{_MODULE}:PegasusXEncoder"
    masks = {"attention_mask": ENCODER_MASK}

    def bind_checked(self, cls: Any, attend: Attend) -> Forward:
        original: Forward = cls.forward

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("output_attentions") is None and module.config.output_attentions:
                kwargs["output_attentions"] = True
            return original(module, *args, **kwargs)

        return forward


class DecoderMasks(MaskCheckPoint):
    """Patch point that checks the masks of the decoder."""

    cls = f"{_MODULE}:PegasusXDecoder"
    masks = DECODER_MASKS


class EncoderAttention(PatchPoint):
    """Patch point of the encoder's attention in blocks, with global tokens."""

    cls = f"{_MODULE}:PegasusXGlobalLocalAttention"
    verified = {
        f"{_MODULE}:PegasusXGlobalLocalAttention.forward": ("1b861d930fa6efd3",),
        f"{_MODULE}:PegasusXGlobalLocalAttention.compute_global_attention_representations": ("a33de3d44a9feb3a",),
        f"{_MODULE}:PegasusXGlobalLocalAttention.compute_local_attention_representations": ("7cd9703a6a21af44",),
        f"{_MODULE}:PegasusXEncoder.forward": ("e2950737cc2b0b8f", "8167df6765e111a1"),
        f"{_MODULE}:PegasusXEncoderLayer.forward": ("04eb35796a594c39",),
        f"{_MODULE}:PegasusXEncoderLayer.pad_local_tokens": ("7182088c8b9aa4fe",),
    }
    traceable = True
    states = "token_hidden_states"

    def describe(self, module: Any) -> str:
        return f"blocks of {module.block_size} + global tokens"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, dim = module.num_heads, module.head_dim
        blocks, tokens = (SegmentRequest(pattern, heads, key_mask=True) for pattern in (_blocks(module), Full()))
        global_tokens = SegmentRequest(Full(), heads)
        return request_for(module, heads, dim, blocks, global_tokens), request_for(
            module, heads, dim, tokens, global_tokens
        )

    def original_serves(self, module: Any, token_hidden_states: Tensor, *args: Any, **kwargs: Any) -> bool:
        # The encoder pads its inputs to whole blocks. The original raises for other lengths, a patch computes them.
        return bool(token_hidden_states.shape[1] % module.block_size == 0)

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def forward(
        self,
        module: Any,
        attend: Attend,
        token_hidden_states: Tensor,
        global_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Return states of tokens ``(batch, length, embed)`` and of global tokens, and the weights if requested.

        ``attention_mask`` ``(batch, length)`` is 0 for tokens, and the most negative number for padding. ``kwargs`` are
        the keywords of the model, which have no effect in the original either.
        """
        states = token_hidden_states
        mask = check_mask("attention_mask", attention_mask, states.shape[0], states.shape[1], states.device)
        real = attend.cached_per_forward(mask, "real", _real)
        dropout, scale = module.dropout if module.training else 0.0, float(module.scaling)
        query, key, value = (_project(module, states, name) for name in ("q_proj", "k_proj", "v_proj"))
        global_query, global_key, global_value = (
            _project(module, global_hidden_states, name) for name in ("q_proj", "k_proj", "v_proj")
        )
        of_globals = Segment(global_key, global_value, Full())
        in_block, anywhere = (Segment(key, value, pattern, key_mask=real) for pattern in (_blocks(module), Full()))
        local = attend(Attention(query, (in_block, of_globals), scale, dropout), output_attentions)
        wide = attend(Attention(global_query, (anywhere, of_globals), scale, dropout), output_attentions)
        outputs, weights = (local.output, wide.output), None
        if local.dropped is not None and wide.dropped is not None:
            blocked = _blocked(local.dropped, module.block_size)
            weights = {"global": torch.cat([wide.dropped[1], wide.dropped[0]], dim=-1), "local": blocked}
            if blocked.requires_grad:  # compute the outputs from the returned weights, so that these get a gradient
                outputs = (
                    _mix_blocked(blocked, global_value, value),
                    weights["global"] @ torch.cat([global_value, value], dim=2),
                )
        of_tokens, of_global_tokens = (module.out_proj(merge_heads(output)) for output in outputs)
        return of_tokens, of_global_tokens, weights


def _blocks(module: Any) -> Chunks:
    return Chunks(module.block_size, before=0, after=0)


def _project(module: Any, states: Tensor, name: str) -> Tensor:
    return split_heads(getattr(module, name)(states), module.head_dim)


def _real(mask: Tensor) -> Tensor | None:
    """Return bool ``(batch, length)``, True for tokens, or None if there is no padding."""
    hidden = mask <= torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else torch.zeros_like(mask).bool()
    if not holds((hidden | (mask == 0)).all(), unknown=True):
        allowed = "0 for tokens and the most negative number of the dtype for padding, as from PegasusXEncoder"
        raise InvalidArgumentError("attention_mask", f"{describe(mask)}, with other values", allowed)
    return None if hides_nothing(~hidden) else ~hidden


def _blocked(weights: tuple[Tensor, ...], block: int) -> Tensor:
    """Convert dense weights to the model's layout ``(batch, heads, blocks, block, globals + block)``.

    ``weights`` are those of the tokens ``(batch, heads, length, length)`` and of the global tokens.
    """
    missing = -weights[0].shape[2] % block
    pad = torch.nn.functional.pad
    in_blocks = pad(weights[0], (0, missing, 0, missing)).unflatten(3, (-1, block)).unflatten(2, (-1, block))
    own_block = in_blocks.diagonal(0, 2, 4).permute(0, 1, 4, 2, 3)  # pairs of equal block indices
    return torch.cat([pad(weights[1], (0, 0, 0, missing)).unflatten(2, (-1, block)), own_block], dim=-1)


def _mix_blocked(blocked: Tensor, global_value: Tensor, value: Tensor) -> Tensor:
    """Return the output ``(batch, heads, length, head_dim)`` for weights in the layout of :func:`_blocked`."""
    of_globals, of_block = blocked.tensor_split([global_value.shape[2]], dim=-1)
    length, block = value.shape[2], blocked.shape[3]
    values = torch.nn.functional.pad(value, (0, 0, 0, -length % block)).unflatten(2, (-1, block))
    mixed = of_globals @ global_value[:, :, None] + of_block @ values
    return mixed.flatten(2, 3)[:, :, :length]


class DecoderAttention(InterfacePoint):
    """Patch point of the decoder's attention. A call with ``key_value_states`` computes cross-attention."""

    cls = f"{_MODULE}:PegasusXAttention"
    verified = {
        f"{_MODULE}:PegasusXAttention.forward": ("c6468db57b98c0ae", "249281d082b62122"),
        f"{_MODULE}:PegasusXDecoder.forward": ("0754aec9a66a785e", "87a9d128667fdad2", "fae7245ddfc3694d"),
        f"{_MODULE}:PegasusXDecoderLayer.forward": ("7fda76b82f92d27f", "29ba36e76a10ded3"),
        f"{_MODULE}:eager_attention_forward": ("4933327352701038",),
    }

    def describe(self, module: Any) -> str:
        return "masked (decoder self or cross)"

    def requests(self, module: Any) -> tuple[Request, ...]:
        heads, patterns = module.num_heads, (Full(cross=True), Full(), Causal(offset=0))
        segments = [SegmentRequest(pattern, heads, key_mask=True) for pattern in patterns]
        return tuple(request_for(module, heads, module.head_dim, segment) for segment in segments)

    def dropout(self, module: Any) -> float:
        return float(module.dropout)

    def bind(self, cls: Any, attend: Attend) -> Forward:
        # The module does not know whether it computes cross-attention, so each kind of call has a separate forward.
        runs = {
            (cross, wanted): self.bind_interface(cls, attend, cross=cross, output_attentions=wanted)
            for cross in (False, True)
            for wanted in (False, True)
        }

        def forward(
            module: Any, hidden_states: Tensor, key_value_states: Tensor | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            run = runs[key_value_states is not None, self.computes_probabilities(module, kwargs)]
            return run(module, hidden_states, key_value_states, *args, **kwargs)

        return forward

    def compute(
        self,
        module: Any,
        attend: Attend,
        implementation: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        output_attentions: bool = False,
        cross: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as the base class does. ``cross`` is whether the call computes cross-attention."""
        read = read_interface_mask(attend, implementation, query, key, attention_mask, bool(module.is_causal))
        read = read._replace(pattern=Full(cross)) if isinstance(read.pattern, Full) else read
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_read(attend, read, query, key, value, scale, dropout, output_attentions)


PEGASUS_X = Adapter(
    model_types=("pegasus_x",),
    versions="5.17 to 5.24",
    points=(EncoderAttention(), EncoderMasks(), DecoderMasks(), DecoderAttention()),
)
