"""A patched Reformer calls its projections, also in cached decoding, where the original multiplies by their weights.

In cached decoding, the original ignores hooks and wrappers, and fails on weights that only support ``linear()``. The
reference is therefore the original with plain layers whose weights were changed to compute the same.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import attnzoo
from attnzoo.adapters.projections import is_plain, project_by_head
from tests.support.models import ids
from tests.support.reformer import attentions, backends, reformer
from tests.support.weights import LowRank, Packed, pack, quantise

PROJECTIONS = ("query_key", "value")


def change(model, make):
    for module in attentions(model):
        for name in PROJECTIONS:
            if hasattr(module, name):
                make(module, name)
    return model


def around(module, name):
    setattr(module, name, LowRank(getattr(module, name)))


def merged(module, name):
    low_rank = LowRank(getattr(module, name))
    with torch.no_grad():
        getattr(module, name).weight += low_rank.up @ low_rank.down


def hooked(module, name):
    getattr(module, name).register_forward_hook(lambda layer, args, output: 1.5 * output)


def larger(module, name):
    with torch.no_grad():
        getattr(module, name).weight *= 1.5


class Larger(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def parametrized(module, name):
    parametrize.register_parametrization(getattr(module, name), "weight", Larger())


def decode(model):
    with torch.no_grad():
        returned = model(ids(2, 10), use_cache=True)
        logits = [returned.logits[:, -1]]
        for step in range(5):
            past = returned.past_buckets_states
            returned = model(ids(2, 1, seed=step), past_buckets_states=past, use_cache=True)
            logits.append(returned.logits[:, -1])
    return torch.stack(logits)


CHANGES = {
    "low rank": (around, merged),
    "hooks": (hooked, larger),
    "parametrized": (parametrized, larger),
    "plain": (lambda *_: None, lambda *_: None),
}


@backends
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_changes_of_a_layer_count_in_cached_decoding(backend, changes):
    model = reformer(num_hashes=3).double()
    changed, equal = (change(copy.deepcopy(model), make) for make in changes)
    expected = decode(equal)
    with attnzoo.patch(changed, backend) as handle:
        torch.testing.assert_close(decode(changed), expected, rtol=1e-9, atol=1e-9)
    assert all(site.calls == 6 for site in handle.sites)


@backends
def test_weights_that_only_support_linear(backend):
    model = reformer().double()
    expected = decode(model)
    with attnzoo.patch(pack(model), backend):
        torch.testing.assert_close(decode(model), expected, rtol=1e-9, atol=1e-9)


def test_quantised_layers_run():
    model = reformer()
    quantised = quantise(model)
    with attnzoo.patch(quantised, "sdpa"):
        assert decode(quantised).isfinite().all()


# The projection alone


def of_head(layer, states, heads):
    """Return the projection, computed by calling the layer for each head."""
    return torch.stack([layer(states[:, h]).chunk(heads, -1)[h] for h in range(heads)], dim=1)


def global_hook():
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_each_head_projects_its_states(wrapped, bias):
    layer, states = nn.Linear(6, 12, bias=bias), torch.randn(2, 3, 5, 6)
    layer = LowRank(layer) if wrapped else layer
    assert is_plain(layer) is not wrapped
    torch.testing.assert_close(project_by_head(layer, states, 3), of_head(layer, states, 3))


@pytest.mark.parametrize(
    "touch",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: setattr(layer, "weight", nn.Parameter(Packed(layer.weight.data), requires_grad=False)),
        lambda layer: setattr(layer, "__class__", type("Mine", (nn.Linear,), {})),
        lambda layer: parametrize.register_parametrization(layer, "weight", Larger()),
        lambda layer: global_hook(),
    ],
    ids=str.split("hook pre-hook backward-hook backward-pre-hook forward weight subclass parametrized hook-on-all"),
)
def test_modified_layer_is_not_plain(touch):
    layer = nn.Linear(6, 12)
    assert is_plain(layer)
    handle = touch(layer)
    try:
        assert not is_plain(layer)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
