"""Which models run in the shootout: published configurations as data, and how real text becomes their inputs.

A family is one entry of :data:`WORKLOADS`; nothing else knows a family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.benchmarks.workload import Inputs, Peer, Workload
from attnzoo.errors import InvalidArgumentError, UnknownNameError

DECODER_TOKENS = 64


def _continuation_inputs(tokens: Tensor) -> Inputs:
    """S encoder tokens; the decoder continues the text."""
    source, target = tokens[:, : -DECODER_TOKENS - 1], tokens[:, -DECODER_TOKENS - 1 :]
    kwargs = dict(
        input_ids=source,
        attention_mask=torch.ones_like(source),
        decoder_input_ids=target[:, :-1].contiguous(),
        use_cache=False,
    )
    return Inputs(kwargs, target[:, 1:].contiguous())


def _led_inputs(tokens: Tensor) -> Inputs:
    """The same, with the first encoder token global (as for summarisation)."""
    inputs = _continuation_inputs(tokens)
    inputs.kwargs["global_attention_mask"] = torch.zeros_like(inputs.kwargs["input_ids"])
    inputs.kwargs["global_attention_mask"][:, 0] = 1
    return inputs


def _led_shrink(published: Mapping[str, Any], layers: int) -> dict[str, Any]:
    windows = list(published["attention_window"])[:layers]
    return {**published, "encoder_layers": layers, "decoder_layers": layers, "attention_window": windows}


def _causal_inputs(tokens: Tensor) -> Inputs:
    kwargs = dict(input_ids=tokens[:, :-1].contiguous(), use_cache=False)
    return Inputs(kwargs, tokens[:, 1:].contiguous())


LED = Workload(
    name="led",
    checkpoint="allenai/led-base-16384",
    published=dict(
        vocab_size=50265,
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
        attention_window=[1024, 1024, 1024, 1024, 1024, 1024],
        max_encoder_position_embeddings=16384,
        max_decoder_position_embeddings=1024,
        activation_function="gelu",
        dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        init_std=0.02,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        tie_word_embeddings=True,
    ),
    config_class="transformers.models.led.configuration_led:LEDConfig",
    model_class="transformers.models.led.modeling_led:LEDForConditionalGeneration",
    attention="LEDEncoderSelfAttention",
    heads=12,
    layers=6,
    special_tokens=4,
    inputs=_led_inputs,
    extra=DECODER_TOKENS + 1,
    shrink=_led_shrink,
    positions="max_encoder_position_embeddings",
)

GPT_NEOX = Workload(
    name="gpt_neox",
    checkpoint="EleutherAI/pythia-160m",
    published=dict(
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        rotary_pct=0.25,
        rotary_emb_base=10000,
        max_position_embeddings=2048,
        initializer_range=0.02,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        use_parallel_residual=True,
    ),
    config_class="transformers.models.gpt_neox.configuration_gpt_neox:GPTNeoXConfig",
    model_class="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXForCausalLM",
    attention="GPTNeoXAttention",
    heads=12,
    layers=12,
    special_tokens=1,
    inputs=_causal_inputs,
    extra=1,
    shrink=lambda published, layers: {**published, "num_hidden_layers": layers},
)


def _longt5(kind: str, checkpoint: str, attention: str, peer: Peer | None = None) -> Workload:
    return Workload(
        name=f"longt5_{kind}",
        checkpoint=checkpoint,
        published=dict(
            vocab_size=32128,
            d_model=768,
            d_kv=64,
            d_ff=2048,
            num_layers=12,
            num_decoder_layers=12,
            num_heads=12,
            local_radius=127,
            global_block_size=16,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            dropout_rate=0.1,
            layer_norm_epsilon=1e-6,
            feed_forward_proj="gated-gelu",
            encoder_attention_type={"local": "local", "tglobal": "transient-global"}[kind],
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        config_class="transformers.models.longt5.configuration_longt5:LongT5Config",
        model_class="transformers.models.longt5.modeling_longt5:LongT5ForConditionalGeneration",
        attention=attention,
        heads=12,
        layers=12,
        special_tokens=3,
        inputs=_continuation_inputs,
        extra=DECODER_TOKENS + 1,
        shrink=lambda published, layers: {**published, "num_layers": layers, "num_decoder_layers": layers},
        peer=peer,
    )


LONGT5_LOCAL = _longt5(
    "local",
    "google/long-t5-local-base",
    "LongT5LocalAttention",
    # The same three blocks of 128, without the bias and without the mask that narrows them to the radius.
    Peer("local-attention", 64, dict(window_size=128, causal=False, look_backward=1, look_forward=1, autopad=True)),
)
LONGT5_TGLOBAL = _longt5("tglobal", "google/long-t5-tglobal-base", "LongT5TransientGlobalAttention")


def _reformer_training(published: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """In training the axial position table covers the input exactly: the first rows of the published one do."""
    columns = published["axial_pos_shape"][1]
    if seq_len % columns:
        allowed = f"a multiple of {columns}, the columns of the axial position table, which training uses whole"
        raise InvalidArgumentError("seq-len", f"{seq_len} to train at", allowed)
    dropouts = ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    return {"axial_pos_shape": [seq_len // columns, columns], **dict.fromkeys(dropouts, 0.0)}


def _reformer(name: str, attention: str, kind: str, peer: Peer) -> Workload:
    return Workload(
        name=name,
        checkpoint="google/reformer-enwik8",
        published=dict(
            vocab_size=258,
            hidden_size=1024,
            num_attention_heads=8,
            attention_head_size=128,
            feed_forward_size=4096,
            hidden_act="relu",
            attn_layers=["local", "local", "lsh", "local"] * 3,
            is_decoder=True,
            num_hashes=4,
            num_buckets=512,
            lsh_attn_chunk_length=256,
            lsh_num_chunks_before=1,
            lsh_num_chunks_after=0,
            local_attn_chunk_length=128,
            local_num_chunks_before=1,
            local_num_chunks_after=0,
            axial_pos_embds=True,
            axial_pos_embds_dim=[256, 768],
            axial_pos_shape=[128, 512],
            max_position_embeddings=65536,
            hash_seed=0,
            tie_word_embeddings=False,
        ),
        config_class="transformers.models.reformer.configuration_reformer:ReformerConfig",
        model_class="transformers.models.reformer.modeling_reformer:ReformerModelWithLMHead",
        attention=attention,
        heads=8,
        layers=12,
        special_tokens=2,
        inputs=_causal_inputs,
        extra=1,
        shrink=lambda published, layers: {**published, "attn_layers": [kind, "lsh", "local"][:layers]},
        positions="max_position_embeddings",
        training=_reformer_training,
        peer=peer,
    )


REFORMER = _reformer(
    "reformer",
    "LSHSelfAttention",
    "lsh",
    # Half the chunk length: a query sees its chunk and the one before, 256 keys per hash, half of the original's 512.
    Peer("reformer-pytorch", 128, dict(bucket_size=128, n_hashes=4, causal=True)),
)
REFORMER_LOCAL = _reformer(
    "reformer_local",
    "LocalSelfAttention",
    "local",
    Peer("local-attention", 128, dict(window_size=128, causal=True, look_backward=1, autopad=True)),
)

GPT_BIGCODE = Workload(
    name="gpt_bigcode",
    checkpoint="bigcode/gpt_bigcode-santacoder",
    published=dict(
        vocab_size=49280,
        n_embd=2048,
        n_layer=24,
        n_head=16,
        n_inner=8192,
        n_positions=2048,
        activation_function="gelu_pytorch_tanh",
        multi_query=True,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        resid_pdrop=0.1,
        bos_token_id=49152,
        eos_token_id=49152,
    ),
    config_class="transformers.models.gpt_bigcode.configuration_gpt_bigcode:GPTBigCodeConfig",
    model_class="transformers.models.gpt_bigcode.modeling_gpt_bigcode:GPTBigCodeForCausalLM",
    attention="GPTBigCodeAttention",
    heads=16,
    layers=24,
    special_tokens=0,
    inputs=_causal_inputs,
    extra=1,
    shrink=lambda published, layers: {**published, "n_layer": layers},
    positions="n_positions",
)


def _masked_inputs(tokens: Tensor) -> Inputs:
    """The first token global, as for classification; the text itself is what is predicted."""
    marks = torch.zeros_like(tokens)
    marks[:, 0] = 1
    kwargs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), global_attention_mask=marks)
    return Inputs(kwargs, tokens)


LONGFORMER = Workload(
    name="longformer",
    checkpoint="allenai/longformer-base-4096",
    published=dict(
        vocab_size=50265,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        attention_window=[512] * 12,
        max_position_embeddings=4098,
        type_vocab_size=1,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
    ),
    config_class="transformers.models.longformer.configuration_longformer:LongformerConfig",
    model_class="transformers.models.longformer.modeling_longformer:LongformerForMaskedLM",
    attention="LongformerSelfAttention",
    heads=12,
    layers=12,
    special_tokens=4,
    inputs=_masked_inputs,
    extra=0,
    shrink=lambda published, layers: {
        **published,
        "num_hidden_layers": layers,
        "attention_window": published["attention_window"][:layers],
    },
    positions="max_position_embeddings",
    reserved=2,  # positions count from pad_token_id + 1
)

# Rotary positions need no table, so GPT-NeoX runs (and is timed) beyond its published 2048 positions.
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (LED, LONGFORMER, LONGT5_LOCAL, LONGT5_TGLOBAL, REFORMER, REFORMER_LOCAL, GPT_NEOX, GPT_BIGCODE)
}


def find_workload(name: str) -> Workload:
    """The workload of a name.

    Raises:
        UnknownNameError: there is none; near misses are suggested.
    """
    if name not in WORKLOADS:
        raise UnknownNameError("model", name, WORKLOADS)
    return WORKLOADS[name]
