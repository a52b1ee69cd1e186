"""Messages: they name the argument, what was got and what is allowed, and they are short whatever was got."""

import numpy
import pytest
import torch

import attnzoo
from attnzoo import InvalidArgumentError, PatchError, UnknownNameError
from attnzoo.spec.segments import describe
from tests.support.fake_backends import small_inputs
from tests.support.models import gpt_neox

LONG = {
    "a list of lists": [[1] * 3000] * 3,
    "an array": numpy.ones((3, 3000)),
    "a string": "x" * 25_000,
    "a dict": {str(number): [number] * 50 for number in range(2000)},
    "a tensor": torch.ones(3, 3000),
}


@pytest.mark.parametrize("given", LONG.values(), ids=LONG)
def test_what_was_got_is_short(given):
    assert len(describe(given)) < 150
    error = InvalidArgumentError("attention_mask", repr(given), "a tensor")
    assert len(str(error)) < 400 and "\n" not in str(error)
    assert str(error).startswith("attention_mask: got ") and str(error).endswith("; allowed: a tensor")
    assert str(error) == f"attention_mask: got {error.got}; allowed: a tensor"


@pytest.mark.parametrize("given", LONG.values(), ids=LONG)
@pytest.mark.parametrize("argument", ["q", "mask", "scale", "dropout", "pattern", "backend"])
def test_whatever_an_attention_is_given_its_message_is_short(argument, given):
    with pytest.raises(InvalidArgumentError, match=f"^{argument}") as caught:
        attnzoo.attention(**small_inputs(**{argument: given}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(2, 3).half(), "(2, 3) float16 on cpu"),
        (numpy.ones((2, 3), dtype="int32"), "numpy.ndarray (2, 3) int32"),
        ([[1, 1], [1, 0]], "list [[1, 1], [1, 0]]"),
        ("all", "str 'all'"),
        (4, "int 4"),
        (None, "NoneType None"),
    ],
)
def test_what_was_got_in_words(given, words):
    assert describe(given) == words


def test_a_long_name_keeps_its_near_miss():
    with pytest.raises(UnknownNameError, match=r"did you mean 'sdpa'") as caught:
        raise UnknownNameError("backend", "sdpa" + " " * 3, ["sdpa", "eager"])
    assert len(str(caught.value)) < 400
    assert len(str(UnknownNameError("backend", "x" * 25_000, ["sdpa"]))) < 400


def test_a_forward_that_somebody_replaced_is_named_without_its_whole_model():
    model = gpt_neox(num_hidden_layers=12)
    module = model.gpt_neox.layers[0].attention
    module.forward = model.forward  # a bound method: its representation holds the model's
    with pytest.raises(
        PatchError, match=r"attention: got a module whose forward was replaced by <bound method"
    ) as caught:
        attnzoo.patch(model, "sdpa")
    assert len(str(caught.value)) < 400
