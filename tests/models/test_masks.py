"""Masks as users type them, through every family: what does not fit is refused by name before anything ran.

What the original takes by design is taken, with the same result: other dtypes, one row for all samples, and masks of
another length where the model cuts and fills them itself.
"""

import numpy
import pytest
import torch
from transformers import DynamicCache

import attnzoo
from attnzoo import InvalidArgumentError
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
    "elsewhere": lambda mask: mask.to("meta"),
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
TAKEN = {
    "bool": torch.Tensor.bool,
    "int32": torch.Tensor.int,
    "float32": torch.Tensor.float,
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
}


def cuts(name, argument):
    """Whether the model makes a mask of its own out of this one, and cuts or fills it."""
    return argument == "decoder_attention_mask" or name.startswith("gpt")


def refused(model, inputs, argument, mask):
    with attnzoo.patch(model, "sdpa") as handle, torch.no_grad():
        with pytest.raises(InvalidArgumentError, match=f"^{argument}[ :].*got .*; allowed: ") as caught:
            model(**{**inputs, argument: mask})
        if argument != "decoder_attention_mask":  # the encoder ran by then; it has no cache
            assert not any(site.calls for site in handle.sites)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED)
@each_mask
def test_what_fits_no_tokens_is_refused_by_name(name, argument, spoil):
    family = FAMILIES[name]
    inputs = family.inputs(24, "right")
    refused(family.build(), inputs, argument, spoil(inputs[argument]))


@pytest.mark.parametrize("change", LENGTHS.values(), ids=LENGTHS)
@each_mask
def test_a_mask_of_another_length(name, argument, change):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    for given in (inputs, {key: value for key, value in inputs.items() if key != "global_attention_mask"}):
        if argument not in given:
            continue
        if not cuts(name, argument):
            refused(model, given, argument, change(inputs[argument]))
            continue
        same(model, {**given, argument: change(inputs[argument])}, inputs)


def same(model, given, inputs, expected=None):
    """A patched model gives what the original gives for ``given``, or for ``expected``, on real tokens."""
    meant = inputs if expected is None else expected
    real = meant.get("decoder_attention_mask", meant["attention_mask"]).bool()
    with torch.no_grad():
        wanted = model(**(given if expected is None else expected))[0][real]
        with attnzoo.patch(model, "sdpa"):
            found = model(**given)[0][real]
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
@each_mask
def test_dtypes_are_those_of_the_original(name, argument, change):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    given = {**inputs, argument: change(inputs[argument])}
    if name == "longt5-tglobal" and argument == "attention_mask" and given[argument].dtype == torch.bool:
        with (
            attnzoo.patch(model, "sdpa"),
            pytest.raises(InvalidArgumentError, match=r"attention_mask: got .* bool .*neg"),
        ):
            model(**given)  # the original fails: it subtracts
        return
    same(model, given, inputs)


@each_mask
def test_one_row_is_for_all_samples(name, argument):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(24, "right")
    model = model.double() if family.coarse else model
    row = inputs[argument][1:2]
    same(model, {**inputs, argument: row}, inputs, {**inputs, argument: row.expand(3, -1)})


@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode])
@pytest.mark.parametrize("filled", [0, 4])
@pytest.mark.parametrize(
    "shape", [(3, 1, 5, 4), (3, 1, 6, -1), (2, 1, 5, -1), (3, 1, 5)], ids=["columns", "rows", "samples", "rank"]
)
def test_a_grid_that_does_not_fit_leaves_the_cache_as_it_was(build, filled, shape):
    """-1: as many columns as there are keys. The first layer's cache would be filled by the time it sees the grid."""
    model, cache = build(), DynamicCache()
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        if filled:
            model(ids(3, filled), past_key_values=cache)
        grid = torch.ones([filled + 5 if size == -1 else size for size in shape]).bool()
        with pytest.raises(
            InvalidArgumentError, match=r"^attention_mask: got .*; allowed: .*grid \(1 or 3, heads or 1, 5, "
        ):
            model(ids(3, 5), attention_mask=grid, past_key_values=cache)
        assert cache.get_seq_length() == filled
        fits = torch.ones(1, 1, 5, filled + 5).bool()
        assert model(ids(3, 5), attention_mask=fits, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("build", [led, longformer])
@pytest.mark.parametrize("argument", ["attention_mask", "is_index_masked", "is_index_global_attn"])
@pytest.mark.parametrize("change", [*LENGTHS.values(), *REFUSED.values()], ids=[*LENGTHS, *REFUSED])
def test_an_attention_module_by_itself(build, argument, change):
    module = next(module for module in build().modules() if hasattr(module, "query_global"))
    mask = torch.ones(3, 24)
    given = dict(attention_mask=0 * mask, is_index_masked=mask < 0, is_index_global_attn=mask < 0)
    spoilt = change(given[argument])
    with attnzoo.patch(module, "eager") as handle, torch.no_grad():
        module(torch.randn(3, 24, 32), is_global_attn=True, **given)
        calls = handle.sites[0].calls
        with pytest.raises(InvalidArgumentError, match=f"^{argument}[ :]"):
            module(torch.randn(3, 24, 32), is_global_attn=True, **{**given, argument: spoilt})
        assert handle.sites[0].calls == calls


# Where the check is not


def test_a_model_whose_forward_somebody_replaced_is_patched_without_the_check():
    model, inputs = gpt_neox(), causal_inputs(16, "left")
    own, seen = model.gpt_neox.forward, []
    model.gpt_neox.forward = lambda *args, **given: (seen.append(1), own(*args, **given))[1]
    with torch.no_grad():
        expected = model(**inputs).logits
        with attnzoo.patch(model, "sdpa"):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=1e-3)
    assert len(seen) == 2 and "forward" in vars(model.gpt_neox)


def test_generation_hands_on_masks_of_its_own():
    """An encoder's output comes with the mask of its tokens; a step has a mask of all tokens so far."""
    for build, inputs in ((led, led_inputs), (longt5, causal_inputs)):
        model, given = build(), inputs(21, "right")
        given = {name: value for name, value in given.items() if not name.startswith("decoder")}
        expected = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        with attnzoo.patch(model, "sdpa"):
            assert torch.equal(model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False), expected)
