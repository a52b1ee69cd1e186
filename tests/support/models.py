"""Tiny models of every family with *spread* weights, and inputs that use the features of the family.

With the default initialisation, attention is nearly uniform, and a lost mask goes unnoticed. With spread weights
(projections with std 1.5 / sqrt(fan_in), embeddings and bias tables with std 1), a lost mask changes logits by tenths.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers

VOCAB = 99


def spread(model, seed=1):
    """Fill all matrices with spread random weights; return the model in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                table = any(word in name for word in ("embed", "shared", "wte", "wpe", "relative_attention_bias"))
                std = 1.0 if table else 1.5 / math.sqrt(parameter.shape[1])
                if name.endswith(".q.weight"):  # T5 does not scale its scores, so its queries are smaller
                    std /= math.sqrt(model.config.d_kv)
                parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model.eval()


def ids(*shape, seed=2):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(batch, length, side):
    """Return a mask with ragged padding: ``"none"``, ``"left"``, ``"right"``, or ``"sample"`` (one whole sample).

    ``"every"`` needs three samples: one with only padding, one padded on the left, one padded on the right.
    """
    mask = torch.ones((batch, length), dtype=torch.long)
    if side == "every":
        cut = length // 3
        mask[0] = mask[1, :cut] = mask[2, length - cut :] = 0
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
        name: the family and its variant.
        build: returns a new tiny model with spread weights in eval mode.
        inputs: ``inputs(length, side)`` returns forward arguments with padding on a side.
        dropouts: configuration names of the attention dropout (LongT5 has one dropout for everything). Empty if some
            attentions have no dropout.
        prompt: ``prompt(side)`` returns arguments of ``generate``; None for models that do not generate.
        block: the block length of its attention: window, chunk, or radius + 1; any number for dense attention.
        static_cache: whether the model supports a static cache.
        coarse: the original code is accurate in float64 only.
        long: a length with many blocks. Every block of BigBird is a kernel call, so its tests have fewer.
    """

    name: str
    build: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict]
    dropouts: tuple[str, ...]
    prompt: Callable[[str], dict] | None = None
    block: int = 8
    static_cache: bool = True
    coarse: bool = False
    long: int = 1000

    def __str__(self):
        return self.name


def led_config(**changes):
    base = dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=[8, 4],
        max_encoder_position_embeddings=1024, max_decoder_position_embeddings=64, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.LEDConfig(**{**base, **changes})


def led(cls="LEDForConditionalGeneration", **changes):
    torch.manual_seed(0)
    return spread(getattr(transformers, cls)(led_config(**changes)))


def globals_of(mask, kind):
    """Return a mask of global tokens: ``"zero"``, ``"one"``, ``"varying"`` (0, 1, 2, ... per sample) or ``"all"``."""
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
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
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
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=1100, pad_token_id=1, bos_token_id=0, eos_token_id=2, attention_dropout=0.0,
        hidden_dropout=0.0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.GPTNeoXConfig(**{**base, **changes})))


def llama(cls="LlamaForCausalLM", **changes):
    """A model without an adapter of its family: the generic adapter serves it."""
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=1100, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.LlamaConfig(**{**base, **changes})))


def gpt_bigcode(cls="GPTBigCodeForCausalLM", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=1100, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.GPTBigCodeConfig(**{**base, **changes})))


def reformer(cls="ReformerModelWithLMHead", **changes):
    """Positions are not axial, because axial positions allow only one length in training."""
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=32,
        attn_layers=["local", "lsh"], is_decoder=True, num_hashes=2, num_buckets=8, hash_seed=7,
        lsh_attn_chunk_length=4, local_attn_chunk_length=4, axial_pos_embds=False, max_position_embeddings=1100,
        hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.ReformerConfig(**{**base, **changes})))


def causal_inputs(length, side, batch=3):
    return dict(input_ids=ids(batch, length), attention_mask=padded(batch, length, side))


def causal_prompt(side):
    return dict(input_ids=ids(3, 9), attention_mask=padded(3, 9, side))


def longt5(cls="LongT5ForConditionalGeneration", kind="local", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_heads=2, num_layers=2, num_decoder_layers=2,
        local_radius=7, global_block_size=4, relative_attention_num_buckets=8, relative_attention_max_distance=16,
        encoder_attention_type=kind, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.LongT5Config(**{**base, **changes})))


def longt5_inputs(length, side, batch=3):
    decoder = padded(batch, 7, "right" if side in ("left", "right") else side)
    return dict(
        **causal_inputs(length, side, batch), decoder_input_ids=ids(batch, 7, seed=3), decoder_attention_mask=decoder
    )


def longt5_prompt(side):
    return causal_inputs(21, side)


def pegasus_x(cls="PegasusXForConditionalGeneration", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, block_size=8, num_global_tokens=3,
        max_position_embeddings=1024, dropout=0.0, attention_dropout=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.PegasusXConfig(**{**base, **changes})))


def bigbird(cls="BigBirdForMaskedLM", **changes):
    """Inputs of more than 14 tokens have block-sparse attention. Otherwise the model uses full attention."""
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        block_size=2, num_random_blocks=1, max_position_embeddings=1100, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.BigBirdConfig(**{**base, **changes})))


def bigbird_pegasus(cls="BigBirdPegasusForConditionalGeneration", **changes):
    torch.manual_seed(0)
    base = dict(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, block_size=2, num_random_blocks=1,
        max_position_embeddings=1100, dropout=0.0, attention_dropout=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=2, scale_embedding=False,
    )  # fmt: skip
    return spread(getattr(transformers, cls)(transformers.BigBirdPegasusConfig(**{**base, **changes})))


# Reformer hides a token from itself with -1e5. If the token sees nothing else, float32 keeps little of its score.
_REFORMER_DROPOUTS = ("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
_LONGT5 = (longt5_inputs, ("dropout_rate",), longt5_prompt)
_BIGCODE = (causal_inputs, ("attn_pdrop",), causal_prompt)
FAMILIES = {
    family.name: family
    for family in (
        Family("led", led, led_inputs, ("attention_dropout",), led_prompt),
        Family("longformer", longformer, longformer_inputs, ("attention_probs_dropout_prob",)),
        Family("longt5-local", partial(longt5, kind="local"), *_LONGT5),
        Family("longt5-tglobal", partial(longt5, kind="transient-global"), *_LONGT5),
        Family("bigbird", bigbird, causal_inputs, (), long=120),
        Family("bigbird_pegasus", bigbird_pegasus, longt5_inputs, (), longt5_prompt, long=120),
        Family("pegasus_x", pegasus_x, longt5_inputs, ("attention_dropout",), longt5_prompt),
        Family("reformer", reformer, causal_inputs, _REFORMER_DROPOUTS, causal_prompt, 4, False, coarse=True),
        Family("gpt_neox", gpt_neox, causal_inputs, ("attention_dropout",), causal_prompt),
        Family("gpt_bigcode-mqa", partial(gpt_bigcode, multi_query=True), *_BIGCODE),
        Family("gpt_bigcode-mha", partial(gpt_bigcode, multi_query=False), *_BIGCODE),
    )
}
