"""GPTBigCode's repaired cross-attention equals an oracle in this file; the original is wrong."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention

import attnzoo
from tests.support.gpt_bigcode import BOTH, HEADS, KINDS, WIDTH, build, check, results, twin
from tests.support.models import causal_inputs, ids, spread


def build_cross(multi_query=False, implementation: str = "sdpa", **changes: Any) -> Any:
    """Build a model with cross-attention. For multi-query, replace the modules, which transformers refuses to build."""
    model = build(implementation, multi_query=False, add_cross_attention=True, **changes)
    if multi_query:
        config = copy.deepcopy(model.config)
        config.multi_query = model.transformer.multi_query = True
        for index, block in enumerate(model.transformer.h):
            block.attn = GPTBigCodeAttention(config, layer_idx=index)
            block.crossattention.c_attn = nn.Linear(WIDTH, 2 * WIDTH // HEADS)
            block.crossattention.multi_query, block.crossattention.kv_heads = True, 1
        spread(model)
    return model.eval()


def test_options_do_not_reach_companions():
    """The patch includes the model around cross-attention, which computes no attention and gets no options."""
    with attnzoo.patch(build_cross(), "blocked-local", window=4) as handle:
        assert {site.approximate for site in handle.sites} == {"window of 4 keys", ""}


def oracle_cross(module: Any, visible: Tensor, hidden_states: Tensor, dropout: float = 0.0, **given: Any) -> Any:
    """Compute cross-attention one head at a time; ``visible`` is ``(batch, length, encoder_length)``."""
    dim = WIDTH // HEADS
    query, keys_values = module.q_attn(hidden_states), module.c_attn(given["encoder_hidden_states"])
    sees_any = visible.any(-1, keepdim=True)
    heads, weights = [], []
    for head in range(HEADS):
        first = 0 if module.multi_query else 2 * dim * head
        key = keys_values[..., first : first + dim]
        value = keys_values[..., first + dim : first + 2 * dim]
        scores = query[..., head * dim : (head + 1) * dim] @ key.transpose(1, 2) * module.scaling
        weights.append(torch.softmax(scores.masked_fill(~visible & sees_any, -math.inf), dim=-1) * sees_any)
        heads.append(value)
    dropped = nn.functional.dropout(torch.stack(weights, dim=1), dropout)
    output = torch.cat([dropped[:, head] @ value for head, value in enumerate(heads)], dim=-1)
    return module.c_proj(output), dropped


def with_oracle(model: Any, visible: Tensor, dtype) -> Any:
    """Return a copy of the model whose cross-attention is the oracle. Call it without an encoder mask."""
    model = copy.deepcopy(model).to(dtype)
    for block in model.transformer.h:
        block.crossattention.forward = partial(oracle_cross, block.crossattention, visible)
    return model


def encoder(batch: int = 3, length=5, dtype=torch.float32) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)


def encoder_masks(batch: int, q_len: int, kv_len: int) -> dict[str, Tensor | None]:
    """Masks in which all encoder tokens of the last sample are padding."""
    two = torch.ones(batch, kv_len, dtype=torch.long)
    two[1, :2] = two[0, 3:] = two[-1] = 0
    three = torch.rand(batch, q_len, kv_len, generator=torch.Generator().manual_seed(2)) < 0.5
    return {"none": None, "2-D": two, "2-D bool": two.bool(), "3-D": two[:, None], "3-D per query": three}


@KINDS
@BOTH
@pytest.mark.parametrize("form", ["none", "2-D", "2-D bool", "3-D", "3-D per query"])
@pytest.mark.parametrize("length", [1, 7])
def test_cross_attention_equals_the_oracle(multi_query, backend, form, length):
    inputs = causal_inputs(length, "right")
    mask = encoder_masks(3, length, 5)[form]
    visible = torch.ones(3, 1, 5, dtype=torch.bool) if mask is None else mask.bool()
    visible = (visible[:, None] if visible.ndim == 2 else visible).expand(3, length, 5)
    model = build_cross(multi_query)

    def run(model: Any, dtype, **more: Any) -> dict[str, Tensor]:
        states = encoder(dtype=dtype).requires_grad_()
        output = results(model, inputs, encoder_hidden_states=states, **more)
        return {**output, "encoder states": states.grad}

    reference = run(with_oracle(model, visible, torch.float64), torch.float64)
    baseline = run(with_oracle(model, visible, torch.float32), torch.float32)
    with attnzoo.patch(model, backend) as handle:
        check(run(model, torch.float32, encoder_attention_mask=mask), reference, baseline)
    attending = [site for site in handle.sites if site.cls == "GPTBigCodeAttention"]
    assert [site.calls for site in attending] == [1] * 4
    assert sum("repaired" in site.pattern for site in attending) == 2


@KINDS
@BOTH
def test_hidden_encoder_tokens_change_nothing(multi_query, backend):
    model, tokens, states = build_cross(multi_query), ids(2, 6), encoder(2)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    with attnzoo.patch(model, backend), torch.no_grad():
        masked = model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask).logits
        cut = model(tokens, encoder_hidden_states=states[:, :3]).logits
        whole = model(tokens, encoder_hidden_states=states).logits
        states[:, 3:] = 100.0
        changed = model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask).logits
        by_position = model.transformer(tokens, None, None, None, None, None, states, mask)
    assert torch.equal(masked, changed)
    assert torch.equal(model.lm_head(by_position[0]), changed)
    torch.testing.assert_close(masked, cut, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(masked, whole, atol=0.1)


@KINDS
@BOTH
@pytest.mark.parametrize("form", ["2-D", "3-D per query"])
def test_cached_steps_equal_one_forward(multi_query, backend, form):
    model, tokens, states = build_cross(multi_query), ids(3, 14), encoder()
    mask = encoder_masks(3, 14, 5)[form]
    caches = [DynamicCache(config=model.config), EncoderDecoderCache(DynamicCache(), DynamicCache())]
    with torch.no_grad(), attnzoo.patch(model, backend):
        expected = model(tokens, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False).logits
        for cache in caches:
            pieces, start = [], 0
            for new in (6, 1, 2, 5):
                part = slice(start, start + new)
                piece = model(
                    tokens[:, part], past_key_values=cache, use_cache=True, encoder_hidden_states=states,
                    encoder_attention_mask=mask if form == "2-D" else mask[:, part],
                )  # fmt: skip
                pieces.append(piece.logits)
                start += new
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)


@KINDS
@BOTH
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_returns_the_same_tokens_with_any_cache(multi_query, backend, beams):
    inputs, options = causal_inputs(4, "left", batch=2), dict(max_new_tokens=8, do_sample=False, num_beams=beams)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model = build_cross(multi_query)
    with attnzoo.patch(model, backend):
        generated = [
            model.generate(
                **inputs, **options, encoder_hidden_states=encoder(2), encoder_attention_mask=mask, **caching
            )
            for caching in (
                dict(use_cache=False),
                dict(use_cache=True),
                dict(cache_implementation="static"),
                dict(past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())),
            )
        ]
    for cached in generated[1:]:
        assert torch.equal(cached, generated[0])
    oracle = with_oracle(model, mask.bool()[:, None].repeat_interleave(beams, dim=0), torch.float32)
    expected = oracle.generate(**inputs, **options, encoder_hidden_states=encoder(2), use_cache=False)
    assert torch.equal(generated[0], expected)


@KINDS
@BOTH
def test_cross_attention_cache_is_filled_once(multi_query, backend):
    model = build_cross(multi_query)
    module, states, hidden = model.transformer.h[1].crossattention, encoder(), encoder(3, 9)
    mask = encoder_masks(3, 9, 5)["2-D"]
    with torch.no_grad(), attnzoo.patch(model, backend):
        expected, _ = module(hidden, encoder_hidden_states=states, encoder_attention_mask=mask)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        pieces, start = [], 0
        for new in (3, 1, 5):
            given = None if start else states  # once it is filled, the cache suffices
            piece, _ = module(
                hidden[:, start : start + new], layer_past=cache, encoder_hidden_states=given,
                encoder_attention_mask=mask,
            )  # fmt: skip
            pieces.append(piece)
            start += new
            kv_heads = 1 if multi_query else HEADS
            assert cache.cross_attention_cache.layers[1].keys.shape == (3, kv_heads, 5, WIDTH // HEADS)
        assert cache.self_attention_cache.get_seq_length() == 0
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_repaired_attention_equals_the_original_where_that_is_right():
    """With one head, one sample, one query and no mask, the faults of the original have no effect."""
    model = build(multi_query=False, add_cross_attention=True, n_head=1)
    given = dict(input_ids=ids(1, 1), encoder_hidden_states=encoder(1))
    with torch.no_grad():
        expected = model(**given).logits
        with attnzoo.patch(model, "sdpa"):
            torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=1e-5)


@KINDS
@BOTH
def test_dropout_applies_in_training_only(multi_query, backend):
    model = build_cross(multi_query, attn_pdrop=0.5).train()
    module, states, hidden = model.transformer.h[0].crossattention, encoder(), encoder(3, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad(), attnzoo.patch(model, backend):
        torch.manual_seed(0)
        got, _ = module(hidden, encoder_hidden_states=states)
        torch.manual_seed(0)
        expected, _ = oracle_cross(module, mask[:, None].expand(3, 4, 5), hidden, 0.5, encoder_hidden_states=states)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        module.resid_dropout.p = 1.0
        assert module(hidden, encoder_hidden_states=states)[0].count_nonzero() == 0
        model.eval()
        expected, _ = oracle_cross(module, mask[:, None].expand(3, 4, 5), hidden, encoder_hidden_states=states)
        got, _ = module(hidden, encoder_hidden_states=states)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_probabilities_equal_the_oracle():
    model, tokens, states, mask = build_cross(), ids(3, 6), encoder(), encoder_masks(3, 6, 5)["2-D"]
    given = dict(encoder_hidden_states=states, encoder_attention_mask=mask, output_attentions=True)
    visible = mask.bool()[:, None].expand(3, 6, 5)
    with torch.no_grad():
        oracle = with_oracle(twin(model, "eager"), visible, torch.float32)
        expected = oracle(tokens, encoder_hidden_states=states, output_attentions=True)
        with attnzoo.patch(model, "eager"):
            got = model(tokens, **given)
        for name in ("attentions", "cross_attentions"):
            assert len(got[name]) == 2
            for ours, theirs in zip(got[name], expected[name], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        refused = pytest.raises(attnzoo.BackendRefusedError, match='backend="eager"')
        for fallback in ("error", "native"):  # nothing falls back to the wrong original
            with attnzoo.patch(model, {"*crossattention": "sdpa"}, fallback=fallback), refused:
                model(tokens, **{**given, "encoder_attention_mask": visible})


@KINDS
def test_returned_weights_are_those_after_dropout(multi_query):
    """The original's self-attention returns weights after dropout, too."""
    model = build_cross(multi_query, attn_pdrop=0.5).train()
    module, states, hidden = model.transformer.h[0].crossattention, encoder(), encoder(3, 4)
    visible = torch.ones(3, 4, 5, dtype=torch.bool)
    with torch.no_grad(), attnzoo.patch(module, "eager"):
        torch.manual_seed(0)
        _, got = module(hidden, encoder_hidden_states=states, output_attentions=True)
        torch.manual_seed(0)
        _, expected = oracle_cross(module, visible, hidden, 0.5, encoder_hidden_states=states)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got == 0).any()


def test_gradient_checkpointing_equals_no_checkpointing():
    model, inputs = build_cross(), causal_inputs(7, "right")
    given = dict(encoder_hidden_states=encoder(), encoder_attention_mask=encoder_masks(3, 7, 5)["2-D"])
    model.train()
    with attnzoo.patch(model, "sdpa"):
        expected = results(model, inputs, **given)
        model.gradient_checkpointing_enable()
        got = results(model, inputs, **given)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


BAD = {
    "rank": (torch.ones(3, 1, 1, 5), r"encoder_attention_mask.*\(1 or 3, 5\)"),
    "length": (torch.ones(3, 4), r"encoder_attention_mask.*\(1 or 3, 5\)"),
    "queries": (torch.ones(3, 4, 5), r"encoder_attention_mask.*\(1 or 3, 6, 5\)"),
    "batch": (torch.ones(2, 5), r"encoder_attention_mask.*\(1 or 3, 5\)"),
    "additive": (torch.full((3, 5), -1e4), "encoder_attention_mask.*0 and 1"),
    "nan": (torch.full((3, 5), math.nan), "encoder_attention_mask.*0 and 1"),
    "no tensor": ([[1] * 5] * 3, "encoder_attention_mask.*list"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_encoder_mask_is_refused_by_name(bad):
    mask, message = BAD[bad]
    model = build_cross()
    with attnzoo.patch(model, "sdpa") as handle, pytest.raises(attnzoo.InvalidArgumentError, match=message):
        model(ids(3, 6), encoder_hidden_states=encoder(), encoder_attention_mask=mask)
    assert {site.calls for site in handle.sites} == {0}, "the model refuses the mask before its first layer"


@pytest.mark.parametrize(
    "states",
    [encoder()[0], encoder()[..., 1:], encoder(2), encoder().half(), encoder().long(), [1.0]],
    ids=["rank", "width", "batch", "dtype", "integers", "no tensor"],
)
def test_bad_encoder_states_are_refused_by_name(states):
    model = build_cross()
    allowed = r"encoder_hidden_states: got .*; allowed: shape \(3, encoder_length, \d+\), float32"
    with attnzoo.patch(model, "sdpa") as handle, pytest.raises(attnzoo.InvalidArgumentError, match=allowed):
        model.transformer.h[0].crossattention(encoder(3, 6), encoder_hidden_states=states)
    assert {site.calls for site in handle.sites} == {0}


def test_autocast_accepts_encoder_states_of_another_dtype():
    model = build_cross()
    with attnzoo.patch(model, "sdpa"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model(ids(3, 6), encoder_hidden_states=encoder().bfloat16()).logits
        torch.testing.assert_close(got, model(ids(3, 6), encoder_hidden_states=encoder()).logits)


def test_bad_calls_are_refused_by_name():
    model, hidden = build_cross(), encoder(3, 6)
    module = model.transformer.h[0].crossattention
    with attnzoo.patch(model, "sdpa"):
        with pytest.raises(attnzoo.AttnzooError, match=r"layer_past.*DynamicCache.*EncoderDecoderCache"):
            module(hidden, encoder_hidden_states=encoder(), layer_past=DynamicCache())
        with pytest.raises(attnzoo.AttnzooError, match="encoder_hidden_states"):
            module(hidden)
        with pytest.raises(attnzoo.AttnzooError, match="softcap"):
            module(hidden, encoder_hidden_states=encoder(), softcap=2.0)


def test_remove_restores_the_original():
    model = build_cross()
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    with attnzoo.patch(model, "sdpa"):
        model(ids(2, 5), encoder_hidden_states=encoder(2))
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="split"):  # the original is wrong again
        model(ids(2, 5), encoder_hidden_states=encoder(2))


def test_patch_of_cross_attention_alone_accepts_2d_masks():
    model, mask = build_cross(), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    with attnzoo.patch(model, {"*.crossattention": "sdpa"}) as handle:
        model(ids(2, 5), encoder_hidden_states=encoder(2), encoder_attention_mask=mask)
    assert [site.name.rpartition(".")[2] for site in handle.sites] == ["crossattention"] * 2
    assert "forward" not in vars(model.transformer)


def test_verify_reports_the_fault_and_compares_with_the_oracle():
    inputs = dict(input_ids=ids(2, 5), encoder_hidden_states=encoder(2))
    report = attnzoo.verify(build_cross(), inputs, "sdpa")
    assert report.ok and not report.original
    assert "wrong width" in report.fault and "the original was not run" in str(report)
