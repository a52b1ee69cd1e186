"""Bad input to ``patch`` and to patched models raises an exception that names the argument, and changes no model."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomModel

import attnzoo
from attnzoo import AttnzooError, BackendRefusedError, InvalidArgumentError, PatchError, UnknownNameError
from tests.support.models import gpt_bigcode, gpt_neox


def test_a_cuda_backend_refuses_a_cpu_model(subject, add_backend, snapshot):
    before, fake = snapshot(subject), add_backend("gpu", devices=frozenset({"cuda"}))
    with pytest.raises(BackendRefusedError, match="device: got cpu; allowed: cuda") as caught:
        attnzoo.patch(subject.model, "gpu")
    assert set(caught.value.refusals) == set(subject.sites), "every site is named, not the first"
    before.assert_unchanged()
    assert not fake.runs


def test_auto_refuses_a_model_that_no_backend_supports(subject):
    """The error names every site and candidate, and nothing is changed."""
    subject.model.to(torch.float8_e4m3fn)
    with pytest.raises(BackendRefusedError, match=r"dtype: got float8_e4m3fn; allowed: .*float32") as caught:
        attnzoo.patch(subject.model, "auto")
    assert set(caught.value.refusals) == set(subject.sites) and caught.value.stage == "patch"
    for reasons in caught.value.refusals.values():
        assert {"backend 'sdpa': dtype", "backend 'eager': dtype"} <= {reason.field for reason in reasons}
    assert not any("forward" in vars(module) for module in subject.model.modules())


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_a_model_without_loaded_weights_raises(subject, backend):
    """All weights lack data, as after accelerate.init_empty_weights, or only one parameter lacks data."""
    name, parameter = next(subject.module().named_parameters())
    whole = f"{subject.sites[0]}.{name}"
    owner, _, last = whole.rpartition(".")
    setattr(subject.model.get_submodule(owner), last, torch.nn.Parameter(parameter.to("meta")))
    for _ in range(2):
        with pytest.raises(PatchError, match=rf"^{whole}: got a parameter on the meta .*; allowed: .*load the weights"):
            attnzoo.patch(subject.model, backend)
        assert not any("forward" in vars(module) for module in subject.model.modules())
        subject.model.to("meta")
    attnzoo.patch(subject.model, "native").remove()


def test_a_backend_refuses_a_dtype_that_it_does_not_support(subject, add_backend):
    add_backend("half", dtypes=frozenset({torch.float16, torch.bfloat16}))
    with pytest.raises(BackendRefusedError, match="dtype: got float32; allowed: bfloat16, float16"):
        attnzoo.patch(subject.model, "half")
    subject.model.to(torch.bfloat16)
    with attnzoo.patch(subject.model, "half") as handle:
        assert subject.logits().isfinite().all()
        assert all(site.calls for site in handle.sites)


@pytest.mark.parametrize(("name", "meant"), [("spda", "sdpa"), ("aeger", "eager"), ("nativ", "native")])
def test_an_unknown_backend_raises_with_a_suggestion(subject, snapshot, name, meant):
    before = snapshot(subject)
    with pytest.raises(UnknownNameError, match=f"backend: got '{name}' .did you mean '{meant}'.*allowed: .*'sdpa'"):
        attnzoo.patch(subject.model, name)
    with pytest.raises(UnknownNameError, match=f"did you mean '{meant}'"):
        attnzoo.patch(subject.model, {subject.sites[0]: "eager", "*": name})
    before.assert_unchanged()


BAD_ARGUMENTS = [
    *(
        (AttnzooError, dict(backend=bad), "backend: got .*; allowed: ")
        for bad in (None, 3, {}, ["sdpa"], {"*": None}, {"*": ["sdpa"]}, {3: "sdpa"})
    ),
    *(
        (UnknownNameError, dict(backend=name, window=3), f"option of backend '{name}': got 'window'; allowed: none")
        for name in ("sdpa", "eager")
    ),
    *(
        (InvalidArgumentError, dict(backend=name, window=3), rf"options: got \['window'\] with backend '{name}'; allo")
        for name in ("auto", "native")
    ),
    *(
        (InvalidArgumentError, dict(backend="sdpa", fallback=bad), f"fallback: got {bad!r}; allowed: 'error' or 'nat")
        for bad in ("eager", None, True)
    ),
]


@pytest.mark.parametrize(("error", "arguments", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_of_patch_raises_and_changes_nothing(subject, snapshot, error, arguments, message):
    before = snapshot(subject)
    with pytest.raises(error, match=message):
        attnzoo.patch(subject.model, **arguments)
    before.assert_unchanged()


def test_a_model_without_an_adapter_raises():
    config = BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1)
    model = BloomModel(config).eval()
    before = model(torch.arange(5)[None]).last_hidden_state
    with pytest.raises(PatchError, match=r"model: got BloomModel of model type bloom, .*allowed: .*gpt_neox, .*led"):
        attnzoo.patch(model, "sdpa")
    assert torch.equal(model(torch.arange(5)[None]).last_hidden_state, before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_module_without_a_config_raises():
    with pytest.raises(PatchError, match=r"model: got Linear of model type none \(no config\), .*register_adapter"):
        attnzoo.patch(torch.nn.Linear(2, 2), "sdpa")


@pytest.mark.parametrize("thing", ["EleutherAI/pythia-70m", None, dict])
@pytest.mark.parametrize("function", [attnzoo.patch, attnzoo.unpatch, attnzoo.is_patched, attnzoo.handle])
def test_a_model_that_is_no_module_raises(function, thing):
    with pytest.raises(InvalidArgumentError, match=r"model: got (str|NoneType|type); allowed: a torch\.nn\.Module"):
        function(thing)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn"])
def test_a_model_with_masks_of_another_implementation_raises(neox, snapshot, implementation):
    before, config = snapshot(neox), neox.model.config
    config._attn_implementation_internal = implementation  # the public setter wants the packages there
    with pytest.raises(PatchError, match=f"_attn_implementation: got '{implementation}'; allowed: .*'eager' or 'sdpa'"):
        attnzoo.patch(neox.model, "sdpa")
    config._attn_implementation_internal = before.before["implementation"]
    before.assert_unchanged()
    module, states, rotary = neox.module(), torch.randn(1, 5, 16), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    with attnzoo.patch(neox.model, "sdpa") as handle:
        config._attn_implementation_internal = implementation  # changed after the patch: the forward checks it
        with pytest.raises(PatchError, match=f"_attn_implementation: got '{implementation}'"):
            module(states, None, position_embeddings=rotary)
        config._attn_implementation_internal = before.before["implementation"]
        assert handle.sites[0].calls == 0
    before.assert_unchanged()


# Masks


def additive(*shape):
    mask = torch.zeros(shape)
    mask[..., -1] = torch.finfo(torch.float32).min
    return mask


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_nan_in_a_float_mask_of_gpt_neox_raises(neox, snapshot, backend):
    before, length = snapshot(neox), neox.inputs["input_ids"].shape[1]
    mask = additive(3, 1, length, length)
    with attnzoo.patch(neox.model, backend), torch.no_grad():
        neox.model(input_ids=neox.inputs["input_ids"], attention_mask=mask)
        mask[1, 0, 2, 3] = float("nan")
        with pytest.raises(
            InvalidArgumentError,
            match=r"attention_mask: got shape \(3, 1, 11, 11\), float32 .*NaN; allowed: .*without NaN",
        ):
            neox.model(input_ids=neox.inputs["input_ids"], attention_mask=mask)
    before.assert_unchanged()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_nan_in_a_float_mask_of_the_led_encoder_raises(led, snapshot, backend):
    before = snapshot(led)
    mask = led.inputs["attention_mask"].float()
    inputs = {**led.inputs, "attention_mask": mask}
    with attnzoo.patch(led.model, backend), torch.no_grad():
        assert torch.allclose(led.model(**inputs).logits, led.logits())
        mask[0, 3] = float("nan")
        with pytest.raises(InvalidArgumentError, match=r"attention_mask: got .*NaN.*; allowed: .*without NaN"):
            led.model(**inputs)
    before.assert_unchanged()


@pytest.mark.parametrize("argument", ["decoder_attention_mask", "encoder_attention_mask"])
def test_nan_in_a_float_mask_of_the_led_decoder_raises(led, snapshot, argument):
    before, decoder = snapshot(led), led.model.led.decoder
    tokens, states = led.inputs["decoder_input_ids"], torch.randn(3, 5, 16)
    self_mask, cross_mask = additive(3, 1, 6, 6), additive(3, 1, 6, 5)
    (self_mask if argument == "decoder_attention_mask" else cross_mask)[1, 0, 2, 3] = float("nan")
    with (
        attnzoo.patch(decoder, "sdpa"),
        torch.no_grad(),
        pytest.raises(InvalidArgumentError, match=r"attention_mask: got .*NaN.*; allowed: .*NaN"),
    ):
        decoder(tokens, self_mask, encoder_hidden_states=states, encoder_attention_mask=cross_mask)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.zeros(3, 11, 11), r"\(3, 11, 11\)"),
        (torch.zeros(3, 1, 11, 11, dtype=torch.long), "int64"),
        (torch.zeros(3, 1, 11, 7).bool(), r"\(3, 1, 11, 7\)"),
        (torch.zeros(3, 1, 11, 7), r"\(3, 1, 11, 7\)"),
    ],
)
def test_a_mask_of_wrong_shape_or_dtype_at_an_attention_module_raises(neox, snapshot, mask, got):
    before, module = snapshot(neox), neox.module()
    states, rotary = torch.randn(3, 11, 16), (torch.ones(3, 11, 8), torch.zeros(3, 11, 8))
    with attnzoo.patch(neox.model, "sdpa") as handle, torch.no_grad():
        module(states, None, position_embeddings=rotary)
        with pytest.raises(InvalidArgumentError, match=f"mask: got .*{got}.*; allowed: .*(4-D|11, 11|1 or 11)"):
            module(states, mask, position_embeddings=rotary)
        assert handle.sites[0].calls == 1
    before.assert_unchanged()


def test_a_keyword_that_no_backend_computes_with_is_refused(neox, snapshot):
    before, module = snapshot(neox), neox.module()
    states, rotary = torch.randn(3, 11, 16), (torch.ones(3, 11, 8), torch.zeros(3, 11, 8))
    with attnzoo.patch(neox.model, "sdpa"), torch.no_grad():
        for name, value in dict(sliding_window=4, softcap=30.0, s_aux=torch.zeros(2), head_mask=torch.ones(2)).items():
            with pytest.raises(InvalidArgumentError, match=f"{name}: got .*; allowed: None"):
                module(states, None, position_embeddings=rotary, **{name: value})
    before.assert_unchanged()


def test_an_unknown_argument_to_an_led_attention_is_refused(led):
    for number in (0, 2):
        with attnzoo.patch(led.model, "sdpa"), pytest.raises(TypeError, match="head_mask"):
            led.module(number)(torch.randn(3, 8, 16), head_mask=torch.ones(2))


def test_an_empty_sequence_at_an_attention_module_raises(led, snapshot):
    before, states, empty = snapshot(led), torch.randn(1, 5, 16), torch.randn(1, 0, 16)
    with attnzoo.patch(led.model, "sdpa") as handle, torch.no_grad():
        for number, more in ((2, {}), (3, dict(key_value_states=states))):
            with pytest.raises(
                InvalidArgumentError, match=r"decoder.*attn: got shape \(1, 0, 16\).*; allowed: .*at least 1"
            ):
                led.module(number)(hidden_states=empty, **more)
        with pytest.raises(InvalidArgumentError, match=r"key: got shape \(1, 2, 0, 8\).*; allowed: .*at least 1"):
            led.module(3)(states, key_value_states=empty)
        assert {site.calls for site in handle.sites} == {0}
    before.assert_unchanged()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("multi_query", [None, True, False])
def test_a_model_call_without_tokens_raises(multi_query, implementation):
    model = gpt_neox() if multi_query is None else gpt_bigcode(multi_query=multi_query)
    model.set_attn_implementation(implementation)
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        for form in (0, 3), (3, 0):
            with pytest.raises(
                InvalidArgumentError, match=r"^input of \w+: got shape \([03], [03]\), .*; allowed: .*at least 1"
            ):
                model(torch.zeros(form, dtype=torch.long))
        assert {site.calls for site in handle.sites} == {0}
