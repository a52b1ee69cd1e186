"""Any model whose attention modules call transformers' attention interface is patched by the generic adapter."""

import functools

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention

import attnzoo
from attnzoo.adapters.eager_forms import form_of
from attnzoo.adapters.generic import AnyInterfaceAttention
from attnzoo.errors import KeywordRefusedError, PatchError
from attnzoo.patching.sites import find_sites
from tests.support.models import gpt_neox, ids, padded, spread

SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
GROUPED = dict(**SIZES, num_key_value_heads=2)


def llama(**config):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **config))


def mistral(**config):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=6, **config))


def bert(**config):
    return transformers.BertModel(transformers.BertConfig(**SIZES, **config))


def modernbert(**config):
    windows = dict(local_attention=8, global_attn_every_n_layers=2)
    return transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **windows, **config))


def t5(**config):
    sizes = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=99)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, **config))


def gpt_oss(**config):
    sizes = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=8, sliding_window=6)
    made = transformers.GptOssConfig(**GROUPED, **sizes, experts_implementation="eager", **config)
    model = transformers.GptOssForCausalLM(made)
    for module in model.modules():
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks)
    return model


def gemma2(**config):
    sizes = dict(head_dim=8, sliding_window=6, attn_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, **sizes, **config))


def vit(**config):
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "pad_token_id")}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4, **config))


MODELS = [llama, mistral, bert, modernbert, t5, gpt_oss, gemma2, vit]
DECODERS = [llama, mistral, gpt_oss, gemma2]


def build(make, implementation="eager"):
    torch.manual_seed(0)
    return spread(make(attn_implementation=implementation))


def inputs_of(model, side="none", length=16):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = dict(input_ids=ids(2, length), attention_mask=padded(2, length, side))
    return {**inputs, "decoder_input_ids": ids(2, 5)} if model.config.is_encoder_decoder else inputs


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", MODELS)
def test_outputs_and_gradients_agree_with_the_oracle(make, side):
    model = build(make)
    backend = "eager" if make is gemma2 else "sdpa"  # sdpa has no softcap
    if make is vit and side != "none":
        pytest.skip("images have no padding")
    report = attnzoo.verify(model, inputs_of(model, side), backend=backend)
    assert report.ok, str(report)


@pytest.mark.parametrize("make", [llama, mistral, bert, t5, vit])
def test_a_model_with_sdpa_attention_agrees(make):
    model = build(make, "sdpa")
    report = attnzoo.verify(model, inputs_of(model, "left" if make is not vit else "none"), backend="sdpa")
    assert report.ok, str(report)


@pytest.mark.parametrize("make", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_the_tokens_of_the_original(make, cache):
    model = build(make)
    inputs = inputs_of(model, "left", length=9)
    arguments = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=cache)
    arguments |= {"disable_compile": True} if cache == "static" else {}
    expected = model.generate(**inputs, **arguments)
    with attnzoo.patch(model, backend="eager" if make is gemma2 else "sdpa") as handle:
        assert torch.equal(model.generate(**inputs, **arguments), expected)
    assert all(site.calls == 5 and site.fallbacks == 0 for site in handle.sites)


def attentions_of(model, inputs, backend="sdpa"):
    """Return the attentions that each site ran."""
    seen = {}
    with attnzoo.patch(model, backend=backend) as handle, torch.no_grad():
        for site in handle.sites:
            site.observer = lambda site, attention, *_: seen.setdefault(site.name, []).append(attention)
        model(**inputs)
    return seen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sliding_window_is_computed_as_a_window(implementation):
    model = build(mistral, implementation)
    for (attention,) in attentions_of(model, inputs_of(model, "left")).values():
        (segment,) = attention.segments
        assert (segment.pattern, segment.mask) == (attnzoo.Window(5, 0), None)
        assert segment.key.shape[1] == 2  # keys are not repeated for groups of query heads


@pytest.mark.parametrize(
    ("make", "pattern"),
    [(llama, attnzoo.Causal(offset=0)), (mistral, attnzoo.Window(5, 0, offset=0)), (bert, attnzoo.Full())],
)
def test_modules_declare_their_pattern(make, pattern):
    """A backend that does not support the pattern is refused when patching."""
    model = build(make)
    for target in find_sites(model):
        (request,) = target.point.requests(target.module)
        assert [segment.pattern for segment in request.segments] == [pattern]


def test_windows_on_both_sides_are_read_per_layer():
    model = build(modernbert)
    first, second = attentions_of(model, inputs_of(model)).values()
    assert first[0].segments[0].pattern == attnzoo.Full()
    assert second[0].segments[0].pattern == attnzoo.Window(4, 4)


def test_sinks_are_a_segment_with_one_key_and_train():
    model = build(gpt_oss)
    for (attention,) in attentions_of(model, inputs_of(model)).values():
        _, sinks = attention.segments
        assert sinks.kv_len == 1
        assert (
            torch.equal(sinks.bias.values.flatten(), model.model.layers[0].self_attn.sinks) or sinks.bias.values.any()
        )
    with attnzoo.patch(model, "sdpa"):
        model(**inputs_of(model)).logits.sum().backward()
    assert all(layer.self_attn.sinks.grad.abs().max() > 0.0 for layer in model.model.layers)


def test_a_softcap_is_refused_by_a_backend_without_one():
    model = build(gemma2)
    with pytest.raises(attnzoo.BackendRefusedError, match=r"refuses at patch time(.|\n)*softcap"):
        attnzoo.patch(model, "sdpa")
    with attnzoo.patch(model, "sdpa", fallback="native") as handle:
        model(**inputs_of(model))
    assert [site.fallbacks for site in handle.sites] == [1, 1]


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        output, weights = forward(*args, **kwargs)
        return 2.0 * output, weights

    return wrapper


class Doubled(LlamaAttention):
    """An attention module whose forward is wrapped by users. A patch would run the forward without the wrapper."""

    forward = doubled(LlamaAttention.forward)


def test_a_wrapped_forward_is_refused():
    model = build(llama)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Doubled(model.config, index)
    with pytest.raises(PatchError, match=r"Doubled.forward: got a function that .*test_generic has wrapped"):
        attnzoo.patch(model, "sdpa")


def beit():
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "pad_token_id")}
    config = transformers.BeitConfig(**sizes, image_size=16, patch_size=4, use_relative_position_bias=True)
    return transformers.BeitModel(config)


def swin():
    sizes = dict(embed_dim=16, depths=[2], num_heads=[2], window_size=2)
    return transformers.SwinModel(transformers.SwinConfig(**sizes, image_size=16, patch_size=4))


@pytest.mark.parametrize("make", [beit, swin])
def test_a_table_of_zeros_gets_a_gradient(make):
    """A trained mask that is all zeros, as at the start of training, must not be treated as no mask."""
    torch.manual_seed(0)
    model = make().eval().double()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    tables = [value for name, value in model.named_parameters() if "relative_position_bias_table" in name]
    for table in tables:
        torch.nn.init.zeros_(table)
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)

    def gradients():
        states = model(pixels).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return torch.autograd.grad((states * weights).sum(), tables)

    expected = gradients()
    with attnzoo.patch(model, "sdpa"):
        got = gradients()
    for one, other in zip(got, expected, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # the original softmax runs in float32


def test_auto_selects_a_backend_with_a_softcap():
    model = build(gemma2)
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    with attnzoo.patch(model, "auto"):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


LSH = dict(num_hashes=2, chunk_length=4, num_buckets=4)


@pytest.mark.parametrize(("backend", "options"), [("blocked-local", dict(window=4, sinks=1)), ("lsh", LSH)])
def test_approximate_backends_change_any_decoder(backend, options):
    model = build(llama)
    inputs = inputs_of(model, length=24)
    expected = model(**inputs).logits
    with attnzoo.patch(model, backend=backend, **options) as handle:
        changed = model(**inputs).logits
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert all(site.approximate for site in handle.sites)
    assert attnzoo.verify(model, inputs, backend=attnzoo.configure(backend, **options)).ok


def test_output_attentions_gives_the_weights_of_the_original():
    model = build(t5)
    inputs = {**inputs_of(model), "output_attentions": True}
    expected = model(**inputs)
    with attnzoo.patch(model, "eager"):
        got = model(**inputs)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_families_with_an_adapter_keep_it():
    points = {type(target.point) for target in find_sites(gpt_neox())}
    assert AnyInterfaceAttention not in points


class Other(LlamaAttention):
    """An attention module that users wrote. Its forward does not call the interface."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


def test_a_module_that_does_not_call_the_interface_is_no_site():
    model = build(llama)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Other(model.config, index)
    with pytest.raises(PatchError, match="no adapter supports"):
        attnzoo.patch(model, "sdpa")


def changed_eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    return torch.zeros_like(query.transpose(1, 2)), None


def test_an_unknown_eager_function_is_refused(monkeypatch):
    model = build(llama)
    source = transformers.models.llama.modeling_llama
    monkeypatch.setattr(source, "eager_attention_forward", changed_eager)
    with pytest.raises(PatchError, match=r"eager_attention_forward.*got fingerprint .* allowed: a form"):
        attnzoo.patch(model, "sdpa")
    assert not attnzoo.is_patched(model)


def test_terms_that_the_original_does_not_compute_are_refused():
    model = build(llama)
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    for keyword, value in dict(softcap=2.0, s_aux=torch.zeros(4), position_bias=torch.zeros(1, 4, 3, 3)).items():
        with pytest.raises(KeywordRefusedError, match=f"{keyword}: got .*; allowed: None"):
            AnyInterfaceAttention().compute(
                module, None, "eager", query, key, key, None, **{keyword: value}, form=form_of(type(module))
            )


def test_the_interface_object_of_transformers_stays_as_it_was():
    model = build(llama)
    before = dict(AttentionInterface()._global_mapping)
    with attnzoo.patch(model, "sdpa"):
        model(**inputs_of(model))
    assert dict(AttentionInterface()._global_mapping) == before
