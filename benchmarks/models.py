"""The models of the benchmark: published configurations, and functions that turn text into model inputs.

To add a family, add a workload to :data:`WORKLOADS`. Otherwise only
``gpu/prediction/goals.py`` names families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.benchmarks.workload import Inputs, Peer, Shape, Workload
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from attnzoo.spec.patterns import Causal, Window

DECODER_TOKENS = 64


def _encoder_decoder_inputs(tokens: Tensor) -> Inputs:
    """Return encoder inputs (all but the last 65 tokens), decoder inputs (the next 64), and targets (the last 64)."""
    source, target = tokens[:, : -DECODER_TOKENS - 1], tokens[:, -DECODER_TOKENS - 1 :]
    decoder_ids = target[:, :-1].contiguous()
    kwargs = dict(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=decoder_ids)
    return Inputs({**kwargs, "use_cache": False}, target[:, 1:].contiguous())


def _causal_inputs(tokens: Tensor) -> Inputs:
    return Inputs(dict(input_ids=tokens[:, :-1].contiguous(), use_cache=False), tokens[:, 1:].contiguous())


def _masked_language_inputs(tokens: Tensor) -> Inputs:
    """Return inputs for a masked language model. The targets are the input tokens themselves."""
    return Inputs(_with_global_token(dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))), tokens)


def _with_global_token(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add a mask that makes the first token global, as is usual for summarisation and classification."""
    mask = torch.zeros_like(kwargs["input_ids"])
    mask[:, 0] = 1
    return {**kwargs, "global_attention_mask": mask}


def _led_inputs(tokens: Tensor) -> Inputs:
    inputs = _encoder_decoder_inputs(tokens)
    return inputs._replace(kwargs=_with_global_token(inputs.kwargs))


def _layers_in(*fields: str) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """Return a function for :attr:`Workload.shrink`.

    In ``fields``, the function sets each integer to the number of layers, and cuts each list to this length.
    """

    def shrink(published: Mapping[str, Any], layers: int) -> dict[str, Any]:
        old = {name: published[name] for name in fields}
        new = {name: value[:layers] if isinstance(value, list) else layers for name, value in old.items()}
        return {**published, **new}

    return shrink


LED = Workload(
    name="led", checkpoint="allenai/led-base-16384", heads=12, layers=6, special_tokens=4,
    model_class="transformers.models.led.modeling_led:LEDForConditionalGeneration",
    attention="LEDEncoderSelfAttention", positions="max_encoder_position_embeddings",
    shrink=_layers_in("encoder_layers", "decoder_layers", "attention_window"),
    inputs=_led_inputs, extra=DECODER_TOKENS + 1,
    published=dict(
        vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072, attention_window=[1024] * 6,
        max_encoder_position_embeddings=16384, max_decoder_position_embeddings=1024, activation_function="gelu",
        dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        init_std=0.02, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        tie_word_embeddings=True,
    ),
    shape=Shape(12, 64, Window(512, 512), global_keys=1),
    small=dict(
        vocab_size=300, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, attention_window=[16] * 2,
        max_encoder_position_embeddings=256, max_decoder_position_embeddings=128,
    ),
)  # fmt: skip
LONGFORMER = Workload(
    name="longformer", checkpoint="allenai/longformer-base-4096", heads=12, layers=12, special_tokens=4,
    model_class="transformers.models.longformer.modeling_longformer:LongformerForMaskedLM",
    attention="LongformerSelfAttention", positions="max_position_embeddings",
    reserved=2,  # the position of the first token is pad_token_id + 1
    shrink=_layers_in("num_hidden_layers", "attention_window"),
    inputs=_masked_language_inputs, extra=0,
    published=dict(
        vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        attention_window=[512] * 12, max_position_embeddings=4098, type_vocab_size=1, hidden_act="gelu",
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, layer_norm_eps=1e-5, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, sep_token_id=2,
    ),
    shape=Shape(12, 64, Window(256, 256), global_keys=1),
    small=dict(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        attention_window=[16] * 2, max_position_embeddings=258,
    ),
)  # fmt: skip
GPT_NEOX = Workload(
    name="gpt_neox", checkpoint="EleutherAI/pythia-160m", heads=12, layers=12, special_tokens=1,
    model_class="transformers.models.gpt_neox.modeling_gpt_neox:GPTNeoXForCausalLM",
    attention="GPTNeoXAttention", positions=None,  # rotary positions have no table, so any length runs
    shrink=_layers_in("num_hidden_layers"),
    inputs=_causal_inputs, extra=1,
    published=dict(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        hidden_act="gelu", rotary_pct=0.25, rotary_emb_base=10000, max_position_embeddings=2048,
        initializer_range=0.02, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        use_parallel_residual=True,
    ),
    shape=Shape(12, 64, Causal()),
    small=dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
)  # fmt: skip
GPT_BIGCODE = Workload(
    name="gpt_bigcode", checkpoint="bigcode/gpt_bigcode-santacoder", heads=16, layers=24, special_tokens=0,
    model_class="transformers.models.gpt_bigcode.modeling_gpt_bigcode:GPTBigCodeForCausalLM",
    attention="GPTBigCodeAttention", positions="n_positions",
    shrink=_layers_in("n_layer"),
    inputs=_causal_inputs, extra=1,
    published=dict(
        vocab_size=49280, n_embd=2048, n_layer=24, n_head=16, n_inner=8192, n_positions=2048,
        activation_function="gelu_pytorch_tanh", multi_query=True, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
        bos_token_id=49152, eos_token_id=49152,
    ),
    shape=Shape(1, 128, Causal()),
    small=dict(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_inner=32, n_positions=256, bos_token_id=0, eos_token_id=0,
    ),
)  # fmt: skip
LONGT5_LOCAL = Workload(
    name="longt5_local", checkpoint="google/long-t5-local-base", heads=12, layers=12, special_tokens=3,
    model_class="transformers.models.longt5.modeling_longt5:LongT5ForConditionalGeneration",
    attention="LongT5LocalAttention",
    shrink=_layers_in("num_layers", "num_decoder_layers"),
    inputs=_encoder_decoder_inputs, extra=DECODER_TOKENS + 1,
    published=dict(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12,
        local_radius=127, global_block_size=16, relative_attention_num_buckets=32, relative_attention_max_distance=128,
        dropout_rate=0.1, layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", encoder_attention_type="local",
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ),
    # The peer attends to the same three blocks of 128, but without the bias and without the mask for the radius.
    peer=Peer(
        "local-attention", 64, dict(window_size=128, causal=False, look_backward=1, look_forward=1, autopad=True)
    ),
    shape=Shape(12, 64, Window(127, 127), has_bias=True),
    small=dict(
        vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, local_radius=7,
        global_block_size=4, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    ),
)  # fmt: skip
LONGT5_TGLOBAL = replace(
    LONGT5_LOCAL,
    name="longt5_tglobal",
    checkpoint="google/long-t5-tglobal-base",
    published={**LONGT5_LOCAL.published, "encoder_attention_type": "transient-global"},
    attention="LongT5TransientGlobalAttention",
    peer=None,
    shape=None,
)
PEGASUS_X = Workload(
    name="pegasus_x", checkpoint="google/pegasus-x-large", heads=16, layers=16, special_tokens=105,
    model_class="transformers.models.pegasus_x.modeling_pegasus_x:PegasusXForConditionalGeneration",
    attention="PegasusXGlobalLocalAttention", positions=None,  # positions are computed, so any length runs
    shrink=_layers_in("encoder_layers", "decoder_layers"),
    inputs=_encoder_decoder_inputs, extra=DECODER_TOKENS + 1,
    published=dict(
        vocab_size=96103, d_model=1024, encoder_layers=16, decoder_layers=16, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, num_global_tokens=128, block_size=512,
        stagger_local_blocks=True, max_position_embeddings=16384, activation_function="gelu", dropout=0.1,
        attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, init_std=0.02,
        scale_embedding=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=True,
    ),
    small=dict(
        vocab_size=400, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_global_tokens=4, block_size=16,
    ),
)  # fmt: skip
BIGBIRD = Workload(
    name="bigbird", checkpoint="google/bigbird-roberta-base", heads=12, layers=12, special_tokens=67,
    model_class="transformers.models.big_bird.modeling_big_bird:BigBirdForMaskedLM",
    attention="BigBirdAttention", positions="max_position_embeddings",
    shrink=_layers_in("num_hidden_layers"),
    inputs=lambda tokens: Inputs(dict(input_ids=tokens, attention_mask=torch.ones_like(tokens)), tokens), extra=0,
    # The model draws random blocks in training mode only.
    training=lambda published, seq_len: dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    published=dict(
        vocab_size=50358, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        hidden_act="gelu_new", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=4096,
        type_vocab_size=2, layer_norm_eps=1e-12, attention_type="block_sparse", block_size=64, num_random_blocks=3,
        use_bias=True, rescale_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, sep_token_id=66,
    ),
    small=dict(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=1024, block_size=4,
    ),
)  # fmt: skip


def _reformer_training(published: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """Return the fields to change for training: no dropout, and an axial position table as long as the input."""
    columns = published["axial_pos_shape"][1]
    if seq_len % columns:
        allowed = f"a multiple of {columns}, because training uses every column of the axial position table"
        raise InvalidArgumentError("seq-len", f"{seq_len} in training", allowed)
    dropouts = ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    return {"axial_pos_shape": [seq_len // columns, columns], **dict.fromkeys(dropouts, 0.0)}


REFORMER = Workload(
    name="reformer", checkpoint="google/reformer-enwik8", heads=8, layers=12, special_tokens=2,
    model_class="transformers.models.reformer.modeling_reformer:ReformerModelWithLMHead",
    attention="LSHSelfAttention", positions="max_position_embeddings", training=_reformer_training,
    shrink=lambda published, layers: {**published, "attn_layers": ["lsh", "lsh", "local"][:layers]},
    inputs=_causal_inputs, extra=1,
    published=dict(
        vocab_size=258, hidden_size=1024, num_attention_heads=8, attention_head_size=128, feed_forward_size=4096,
        hidden_act="relu", attn_layers=["local", "local", "lsh", "local"] * 3, is_decoder=True, num_hashes=4,
        num_buckets=512, lsh_attn_chunk_length=256, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        local_attn_chunk_length=128, local_num_chunks_before=1, local_num_chunks_after=0, axial_pos_embds=True,
        axial_pos_embds_dim=[256, 768], axial_pos_shape=[128, 512], max_position_embeddings=65536, hash_seed=0,
        tie_word_embeddings=False,
    ),
    # A query of the peer sees the current and the previous bucket: 256 keys per hash. The original sees 512 keys.
    peer=Peer("reformer-pytorch", 128, dict(bucket_size=128, n_hashes=4, causal=True)),
    small=dict(
        vocab_size=300, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
        attn_layers=["local", "lsh"], num_hashes=2, num_buckets=8, lsh_attn_chunk_length=8, local_attn_chunk_length=8,
        axial_pos_embds_dim=[16, 16], axial_pos_shape=[16, 16], max_position_embeddings=256,
    ),
)  # fmt: skip
REFORMER_LOCAL = replace(
    REFORMER,
    name="reformer_local",
    attention="LocalSelfAttention",
    shrink=lambda published, layers: {**published, "attn_layers": ["local", "lsh", "local"][:layers]},
    peer=Peer("local-attention", 128, dict(window_size=128, causal=True, look_backward=1, autopad=True)),
    # A query sees 129 to 256 keys in its chunk of 128 and in the chunk before.
    shape=Shape(8, 128, Window(192, 0)),
)

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        LED, LONGFORMER, LONGT5_LOCAL, LONGT5_TGLOBAL, BIGBIRD, PEGASUS_X, REFORMER, REFORMER_LOCAL, GPT_NEOX,
        GPT_BIGCODE,
    )
}  # fmt: skip


def find_workload(name: str) -> Workload:
    """Return the workload called ``name``. Raise UnknownNameError if no workload has this name."""
    if name not in WORKLOADS:
        raise UnknownNameError("model", name, WORKLOADS)
    return WORKLOADS[name]
