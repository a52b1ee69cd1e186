"""Masks of users in every family: a mask that does not fit is refused by name before the model runs.

Masks that the original accepts by design give the same result: other dtypes, one row for all samples, and other lengths
if the model cuts and fills the mask.
"""

import inspect
import itertools

import numpy
import pytest
import torch
from transformers import DynamicCache

import attnzoo
from attnzoo import InvalidArgumentError
from attnzoo.patching.mask_arguments import MaskCheckPoint
from attnzoo.patching.sites import find_sites
from tests.support.models import (
    FAMILIES,
    causal_inputs,
    gpt_bigcode,
    gpt_neox,
    ids,
    led,
    led_inputs,
    longformer,
    longt5,
)

ARGUMENTS = [
    (name, argument)
    for name, family in FAMILIES.items()
    for argument in family.inputs(24, "right")
    if argument.endswith("mask")
]
each_mask = pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[" ".join(pair) for pair in ARGUMENTS])

REFUSED = {
    "one dimension": lambda mask: mask[0],
    "three dimensions": lambda mask: mask[:, None],
    "five dimensions": lambda mask: mask[:, None, None, None],
    "other samples": lambda mask: mask[:2],
    "more samples": lambda mask: mask.repeat(2, 1),
    "an array": lambda mask: mask.numpy(),
    "an array of strings": lambda mask: numpy.array([["real"] * 24] * 3),
    "a list": lambda mask: mask.tolist(),
    "True": lambda mask: True,
    "another device": lambda mask: mask.to("meta"),
    "NaN": lambda mask: mask.float().masked_fill(torch.arange(mask.shape[1]) == 1, float("nan")),
    "complex": lambda mask: mask.to(torch.complex64),
    "sparse": lambda mask: mask.to_sparse(),
}
LENGTHS = {
    "longer": lambda mask: torch.cat([mask, mask[:, -1:]], 1),
    "longer, all ones": lambda mask: torch.ones(mask.shape[0], mask.shape[1] + 1).long(),
    "shorter": lambda mask: mask[:, :-1],
    "shorter, all ones": lambda mask: torch.ones(mask.shape[0], mask.shape[1] - 1).long(),
}
ACCEPTED_DTYPES = {
    "bool": torch.Tensor.bool,
    "int32": torch.Tensor.int,
    "float32": torch.Tensor.float,
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
}


def cuts(name, argument):
    """Whether the model derives another mask from this one, and cuts or fills it."""
    return argument == "decoder_attention_mask" or name.startswith("gpt")


def assert_refused(model, inputs, argument, mask):
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        with pytest.raises(InvalidArgumentError, match=f"^{argument}[ :].*got .*; allowed: ") as caught:
            model(**{**inputs, argument: mask})
        if argument != "decoder_attention_mask":  # the encoder has run then; it has no cache
            assert not any(site.calls for site in handle.sites)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED)
@each_mask
def test_mask_that_fits_no_tokens_is_refused_by_name(name, argument, spoil):
    family = FAMILIES[name]
    inputs = family.inputs(24, "right")
    assert_refused(family.build(), inputs, argument, spoil(inputs[argument]))


@pytest.mark.parametrize("change", LENGTHS.values(), ids=LENGTHS)
@each_mask
def test_mask_of_another_length_is_refused_unless_the_model_cuts_it(name, argument, change):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    for given in (inputs, {key: value for key, value in inputs.items() if key != "global_attention_mask"}):
        if argument not in given:
            continue
        if not cuts(name, argument):
            assert_refused(model, given, argument, change(inputs[argument]))
            continue
        assert_same(model, {**given, argument: change(inputs[argument])}, inputs)


def assert_same(model, given, inputs, expected=None):
    """Assert that the patched model gives on ``given`` what the original gives on ``expected`` (None: on ``given``)."""
    masks = inputs if expected is None else expected
    real = masks.get("decoder_attention_mask", masks["attention_mask"]).bool()
    with torch.no_grad():
        original = model(**(given if expected is None else expected))[0][real]
        with attnzoo.patch(model, "sdpa"):
            patched = model(**given)[0][real]
    assert (patched - original).abs().max() <= 1e-3 * original.abs().max()


@pytest.mark.parametrize("change", ACCEPTED_DTYPES.values(), ids=ACCEPTED_DTYPES)
@each_mask
def test_mask_dtypes_of_the_original_are_accepted(name, argument, change):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    given = {**inputs, argument: change(inputs[argument])}
    if name == "longt5-tglobal" and argument == "attention_mask" and given[argument].dtype == torch.bool:
        refused = pytest.raises(InvalidArgumentError, match=r"attention_mask: got .* bool .*signed")
        with attnzoo.patch(model, "sdpa"), refused:
            model(**given)  # the original fails, because it subtracts the mask
        return
    # BigBird subtracts the mask, too. The patch converts a bool mask, which may come after a short input without error.
    fails = name == "bigbird" and given[argument].dtype == torch.bool
    assert_same(model, given, inputs, inputs if fails else None)


@each_mask
def test_one_row_applies_to_all_samples(name, argument):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    model = model.double() if family.coarse else model
    row = inputs[argument][1:2]
    assert_same(model, {**inputs, argument: row}, inputs, {**inputs, argument: row.expand(3, -1)})


@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode])
@pytest.mark.parametrize("filled", [0, 4])
@pytest.mark.parametrize(
    "shape", [(3, 1, 5, 4), (3, 1, 6, -1), (2, 1, 5, -1), (3, 1, 5)], ids=["columns", "rows", "samples", "rank"]
)
def test_4d_mask_that_does_not_fit_leaves_the_cache_unchanged(build, filled, shape):
    """The check runs before the first layer fills its cache. (-1 stands for as many columns as keys.)"""
    model, cache = build(), DynamicCache()
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        if filled:
            model(ids(3, filled), past_key_values=cache)
        grid = torch.ones([filled + 5 if size == -1 else size for size in shape]).bool()
        message = r"^attention_mask: got .*; allowed: .* \(1 or 3, 1 or heads, 5, "
        with pytest.raises(InvalidArgumentError, match=message):
            model(ids(3, 5), attention_mask=grid, past_key_values=cache)
        assert cache.get_seq_length() == filled
        fits = torch.ones(1, 1, 5, filled + 5).bool()
        assert model(ids(3, 5), attention_mask=fits, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("build", [led, longformer])
@pytest.mark.parametrize("argument", ["attention_mask", "is_index_masked", "is_index_global_attn"])
@pytest.mark.parametrize("change", [*LENGTHS.values(), *REFUSED.values()], ids=[*LENGTHS, *REFUSED])
def test_attention_module_alone_refuses_a_mask_that_does_not_fit(build, argument, change):
    module = next(module for module in build().modules() if hasattr(module, "query_global"))
    mask = torch.ones(3, 24)
    given = dict(attention_mask=0 * mask, is_index_masked=mask < 0, is_index_global_attn=mask < 0)
    bad_mask = change(given[argument])
    with attnzoo.patch(module, "eager") as handle, torch.no_grad():
        module(torch.randn(3, 24, 32), is_global_attn=True, **given)
        calls = handle.sites[0].calls
        with pytest.raises(InvalidArgumentError, match=f"^{argument}[ :]"):
            module(torch.randn(3, 24, 32), is_global_attn=True, **{**given, argument: bad_mask})
        assert handle.sites[0].calls == calls


def test_model_with_a_replaced_forward_has_no_mask_check():
    model, inputs = gpt_neox(), causal_inputs(16, "left")
    forward, calls = model.gpt_neox.forward, []
    model.gpt_neox.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    with torch.no_grad():
        expected = model(**inputs).logits
        with attnzoo.patch(model, "sdpa"):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=1e-3)
    assert len(calls) == 2 and "forward" in vars(model.gpt_neox)


def test_generation_passes_masks_of_other_lengths():
    """The mask of an encoder's output has the length of the input; the mask of a step covers all previous tokens."""
    for build, inputs in ((led, led_inputs), (longt5, causal_inputs)):
        model, given = build(), inputs(21, "right")
        given = {name: value for name, value in given.items() if not name.startswith("decoder")}
        expected = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with attnzoo.patch(model, "sdpa"):
            assert torch.equal(model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False), expected)


def finite_grid(q_len, kv_len, causal):
    """Return an additive mask with another value for each pair. If ``causal``, the mask hides later keys."""
    grid = torch.randn(3, 1, q_len, kv_len, generator=torch.Generator().manual_seed(4))
    return grid.masked_fill(~torch.ones(q_len, kv_len, dtype=torch.bool).tril(), -torch.inf) if causal else grid


ADDITIVE = [
    *((name, "attention_mask") for name in ("gpt_neox", "gpt_bigcode-mqa", "gpt_bigcode-mha", "led", "longt5-local")),
    *((name, "encoder_attention_mask") for name in ("led", "longt5-local")),
]


@pytest.mark.parametrize(("name", "argument"), ADDITIVE)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_finite_values_of_an_additive_mask_reach_the_scores(name, argument, backend):
    """The values are a bias in self- and cross-attention, beside the learned bias of LongT5."""
    model = FAMILIES[name].build()
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    given = dict(input_ids=ids(3, 6, seed=3))
    if model.config.is_encoder_decoder:
        given["encoder_hidden_states"] = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(5))
    causal = argument == "attention_mask"
    changed = {**given, argument: finite_grid(6, 6 if causal else 5, causal)}
    with torch.no_grad():
        without, expected = decoder(**given)[0], decoder(**changed)[0]
        with attnzoo.patch(model, backend):
            got = decoder(**changed)[0]
    size = expected.abs().max()
    assert (expected - without).abs().max() > 0.01 * size
    assert (got - expected).abs().max() < 1e-5 * size


KEYWORDS_ONLY = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")  # decorators of the originals


def positional(module, args, kwargs):
    """Return the arguments of a call, as many by position as the original forward allows."""
    parameters = inspect.signature(module.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    names = list(itertools.takewhile(lambda name: name not in KEYWORDS_ONLY, parameters))
    names = [name for name in names if parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return [given.pop(name, parameters[name].default) for name in names], given


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_arguments_by_position_behind_a_mask_reach_the_model(family):
    model, inputs = family.build(), family.inputs(24, "right")
    inputs |= {} if family.name == "longformer" else dict(use_cache=False)
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["position_ids"] = torch.arange(24).flip(0).expand(3, -1)
    modules = [t.module for t in find_sites(model) if isinstance(t.point, MaskCheckPoint)]
    given = {}
    with torch.no_grad():
        for module in modules:
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs: given.setdefault(module, (args, kwargs)), with_kwargs=True
            )
            model(**inputs)
            hook.remove()
        with attnzoo.patch(model, "sdpa"):
            for module, (args, kwargs) in given.items():
                expected = module(*args, **kwargs)[0]
                args, kwargs = positional(module, args, kwargs)
                assert len(args) > 2 and not any(name.endswith("mask") for name in kwargs)
                assert torch.equal(module(*args, **kwargs)[0], expected)
    assert len(given) == len(modules) > 0
