"""Tiny models of every family on *spread* weights, and inputs that use what the family has.

At default initialisation attention is nearly uniform and a lost mask goes unseen; spread weights (projections with std
1.5 / sqrt(fan_in), embeddings 1) move logits by tenths when anything is lost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

VOCAB = 99


def spread(model, seed=1):
    """Fill all matrices with wide random numbers; returns the model in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                embedding = any(word in name for word in ("embed", "shared", "wte", "wpe"))
                std = 1.0 if embedding else 1.5 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model.eval()


def ids(*shape, seed=2):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(batch, length, side):
    """A mask with ragged padding on a side: ``"none"``, ``"left"``, ``"right"``, or ``"sample"`` (a whole one)."""
    mask = torch.ones((batch, length), dtype=torch.long)
    for row in range(batch):
        cut = (row * length) // (batch + 1)
        if cut and side == "left":
            mask[row, :cut] = 0
        elif cut and side == "right":
            mask[row, length - cut :] = 0
    if side == "sample":
        mask[-1] = 0
    return mask


@dataclass(frozen=True)
class Family:
    """A model family under test.

    Attributes:
        name: of the family and its variant.
        build: a fresh tiny model, spread, in eval mode.
        inputs: ``inputs(length, side)``: forward arguments with padding on a side.
        prompt: ``prompt(side)``: arguments of generate, or None for models that do not generate.
        static_cache: whether the model supports a static cache.
    """

    name: str
    build: Callable[..., torch.nn.Module]
    inputs: Callable[[int, str], dict]
    prompt: Callable[[str], dict] | None = None
    static_cache: bool = False

    def __str__(self):
        return self.name


def led_config(**changes):
    base = dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=[8, 4],
        max_encoder_position_embeddings=1024, max_decoder_position_embeddings=64, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.LEDConfig(**{**base, **changes})


def led(cls="LEDForConditionalGeneration", **changes):
    torch.manual_seed(0)
    return spread(getattr(transformers, cls)(led_config(**changes)))


def globals_of(mask, kind):
    """Which real tokens are global: ``"zero"``, ``"one"``, ``"varying"`` (0, 1, 2, ... per sample) or ``"all"``."""
    chosen = torch.zeros_like(mask)
    for row in range(mask.shape[0]):
        real = mask[row].nonzero().flatten()
        count = {"zero": 0, "one": 1, "varying": row, "all": len(real)}[kind]
        chosen[row, real[torch.linspace(0, len(real) - 1, count).long()] if count and len(real) else []] = 1
    return chosen


def led_inputs(length, side, globals_="varying", batch=3):
    mask = padded(batch, length, side)
    decoder = padded(batch, 7, "right" if side in ("left", "right") else side)
    return dict(
        input_ids=ids(batch, length),
        attention_mask=mask,
        global_attention_mask=globals_of(mask, globals_),
        decoder_input_ids=ids(batch, 7, seed=3),
        decoder_attention_mask=decoder,
    )


def led_prompt(side):
    mask = padded(3, 21, side)
    return dict(input_ids=ids(3, 21), attention_mask=mask, global_attention_mask=globals_of(mask, "varying"))


def longformer(cls="LongformerForMaskedLM", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        attention_window=[8, 4], max_position_embeddings=1100, pad_token_id=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.LongformerConfig(**{**base, **changes})))


def longformer_inputs(length, side, globals_="varying", batch=3):
    mask = padded(batch, length, side)
    return dict(input_ids=ids(batch, length), attention_mask=mask, global_attention_mask=globals_of(mask, globals_))


def gpt_neox(cls="GPTNeoXForCausalLM", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=1100, pad_token_id=1, bos_token_id=0, eos_token_id=2, attention_dropout=0.0,
        hidden_dropout=0.0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.GPTNeoXConfig(**{**base, **changes})))


def causal_inputs(length, side, batch=3):
    return dict(input_ids=ids(batch, length), attention_mask=padded(batch, length, side))


def causal_prompt(side):
    return dict(input_ids=ids(3, 9), attention_mask=padded(3, 9, side))


FAMILIES = {
    family.name: family
    for family in (
        Family("led", led, led_inputs, led_prompt),
        Family("longformer", longformer, longformer_inputs),
        Family("gpt_neox", gpt_neox, causal_inputs, causal_prompt, static_cache=True),
    )
}
