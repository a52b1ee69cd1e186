"""Mistakes of adapter authors raise errors that name the mistake, when the adapter is made or a model is patched."""

import copy

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import Adapter, InvalidArgumentError, PatchPoint
from attnzoo.registry import registry


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, states):
        scores = self.query(states) @ self.key(states).transpose(1, 2) * 8**-0.5
        return scores.softmax(-1) @ self.value(states)


class Described(PatchPoint):
    cls = f"{__name__}:OneHead"

    def describe(self, module):
        return "full"


class OneHeadPoint(Described):
    def requests(self, module):
        weight, segment = module.query.weight, attnzoo.SegmentRequest(attnzoo.Full(), 1)
        return (attnzoo.Request(weight.device.type, weight.dtype, 1, 8, 8, (segment,)),)

    def forward(self, module, attend, states):
        query, key, value = (layer(states)[:, None] for layer in (module.query, module.key, module.value))
        return attend(attnzoo.Attention(query, (attnzoo.Segment(key, value),), 8**-0.5)).output[:, 0]


@pytest.fixture
def one_head(isolated_registry):
    """A model, and a function that registers a point for it."""
    return OneHead(), lambda point: registry.register_adapter(Adapter(("one_head",), (point,)), replace=True)


def test_point_with_three_methods_serves_a_module(one_head):
    model, register = one_head
    register(OneHeadPoint())
    states = torch.randn(2, 5, 8)
    with attnzoo.patch(model, "sdpa") as handle:
        torch.testing.assert_close(model(states), OneHead.forward(model, states))
    assert [(site.pattern, site.calls) for site in handle.sites] == [("full", 1)]


def test_forward_gets_the_copy_that_is_called(one_head):
    model, register = one_head
    register(OneHeadPoint())
    with attnzoo.patch(model, "sdpa"):
        twin, states = copy.copy(model), torch.randn(2, 5, 8)
        twin._modules = {**twin._modules, "value": nn.Linear(8, 8)}
        torch.testing.assert_close(twin(states), OneHead.forward(twin, states))
        torch.testing.assert_close(model(states), OneHead.forward(model, states))


def test_point_without_describe_cannot_be_made():
    with pytest.raises(TypeError, match="abstract method"):
        type("Nameless", (PatchPoint,), {"cls": "package:Class"})()


def test_point_without_forward_names_what_is_missing(one_head):
    model, register = one_head
    register(Described())
    with (
        attnzoo.patch(model, "sdpa"),
        pytest.raises(NotImplementedError, match="Described: got neither forward nor bind"),
    ):
        model(torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "point",
    [OneHeadPoint, type("NoClass", (OneHeadPoint,), {"cls": ""})(), "a name"],
    ids=["class", "no class", "name"],
)
def test_adapter_refuses_what_is_no_point(point):
    with pytest.raises(InvalidArgumentError, match=r"points: got .*; allowed: instances of PatchPoint subclasses"):
        Adapter(model_types=("one_head",), points=(point,))


def test_adapter_refuses_a_cache_that_is_no_tuple():
    """Each character of a string would count as the name of a keyword argument."""
    point = type("OneName", (OneHeadPoint,), {"cache": "layer_past"})()
    with pytest.raises(InvalidArgumentError, match=r"OneName.cache: got 'layer_past'; allowed: a tuple of names"):
        Adapter(model_types=("one_head",), points=(point,))
