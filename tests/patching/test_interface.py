"""``InterfacePoint.compute`` takes the arguments of transformers' attention functions, and their defaults."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnzoo.adapters.gpt_neox import SelfAttention
from attnzoo.errors import PatchError
from attnzoo.patching.interface import rebind
from tests.support.attend import RecordingAttend


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("is_causal", "of_module"), [(None, True), (None, False), (True, False), (False, True)])
def test_compute_has_the_defaults_of_the_original_function(scaling, is_causal, of_module):
    """The scale is ``head_dim**-0.5``. Without the argument ``is_causal``, the module decides about causality."""
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    module = SimpleNamespace(config=SimpleNamespace(), is_causal=of_module, training=False)
    attend = RecordingAttend("eager")
    arguments = (query, key, value, None)
    output, weights = SelfAttention().compute(
        module, attend, "sdpa", *arguments, scaling=scaling, is_causal=is_causal, output_attentions=None
    )
    expected, _ = sdpa_attention_forward(module, *arguments, scaling=scaling, is_causal=is_causal)
    torch.testing.assert_close(output, expected)
    assert weights is None and attend.ran[0].scale == (8**-0.5 if scaling is None else scaling)


@pytest.mark.parametrize(
    ("keyword", "configured", "wanted"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_keyword_decides_about_probabilities_before_the_config(keyword, configured, wanted):
    module = SimpleNamespace(config=SimpleNamespace(output_attentions=configured))
    assert SelfAttention().wants_probabilities(module, {"output_attentions": keyword}) == wanted


@pytest.mark.parametrize("wanted", [False, True])
def test_weights_are_returned_on_request(wanted):
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    module, attend = SimpleNamespace(is_causal=True, training=False), RecordingAttend("eager")
    _, weights = SelfAttention().compute(module, attend, "eager", query, key, value, None, output_attentions=wanted)
    assert (weights is not None) == wanted


# Copies of a forward with other globals

SCALE = 2


def doubling(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


@doubling
@torch.no_grad()
def scaled(tensor, *, power=1):
    return SCALE * tensor**power


def test_decorators_run_around_a_copy_with_other_globals():
    tensor = torch.ones(2, requires_grad=True)
    copy = rebind(scaled, SCALE=5)
    assert torch.equal(copy(tensor, power=2), torch.full((2,), 10.0)) and torch.equal(scaled(tensor), 4 * tensor)
    assert not copy(tensor).requires_grad
    assert inspect.unwrap(copy).__globals__["SCALE"] == 5 and inspect.signature(copy) == inspect.signature(scaled)
    assert copy.__code__ is not scaled.__code__, "torch.compile stores compiled code by code object"


def test_a_decorator_without_a_closure_is_refused():
    for decorated in (functools.lru_cache(scaled), functools.wraps(scaled)(lambda tensor: tensor)):
        with pytest.raises(PatchError, match=r"decorator: got .*; allowed: .* in its closure"):
            rebind(decorated, SCALE=5)


def test_a_function_that_does_not_use_the_global_is_refused():
    with pytest.raises(PatchError, match=r"got <function .*scaled.*; allowed: .*\['OTHER'\]"):
        rebind(scaled, OTHER=5)
