"""Messages name the argument, what was got and what is allowed, and stay short for any value."""

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
def test_messages_shorten_the_value(given):
    assert len(describe(given)) < 150
    error = InvalidArgumentError("attention_mask", repr(given), "a tensor")
    assert len(str(error)) < 400 and "\n" not in str(error)
    assert str(error).startswith("attention_mask: got ") and str(error).endswith("; allowed: a tensor")
    assert str(error) == f"attention_mask: got {error.got}; allowed: a tensor"


@pytest.mark.parametrize("given", LONG.values(), ids=LONG)
@pytest.mark.parametrize("argument", ["q", "mask", "scale", "dropout", "pattern", "backend"])
def test_attention_raises_short_messages(argument, given):
    with pytest.raises(InvalidArgumentError, match=f"^{argument}") as caught:
        attnzoo.attention(**small_inputs(**{argument: given}))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(2, 3).half(), "shape (2, 3), float16 on cpu"),
        (numpy.ones((2, 3), dtype="int32"), "numpy.ndarray of shape (2, 3), int32"),
        ([[1, 1], [1, 0]], "list [[1, 1], [1, 0]]"),
        ("all", "str 'all'"),
        (4, "int 4"),
        (None, "NoneType None"),
    ],
)
def test_describe_names_type_shape_dtype_and_device(given, words):
    assert describe(given) == words


def test_unknown_names_stay_short_and_keep_the_suggestion():
    with pytest.raises(UnknownNameError, match=r"did you mean 'sdpa'") as caught:
        raise UnknownNameError("backend", "sdpa" + " " * 3, ["sdpa", "eager"])
    assert len(str(caught.value)) < 400
    assert len(str(UnknownNameError("backend", "x" * 25_000, ["sdpa"]))) < 400


def test_patch_names_a_replaced_forward_without_the_whole_model():
    model = gpt_neox(num_hidden_layers=12)
    module = model.gpt_neox.layers[0].attention
    module.forward = model.forward  # the repr of a bound method includes that of the model
    with pytest.raises(PatchError, match="attention: got a module whose forward was replaced by <bound meth") as caught:
        attnzoo.patch(model, "sdpa")
    assert len(str(caught.value)) < 400
