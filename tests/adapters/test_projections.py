"""A linear layer applied head by head equals the layer, also with a bias, a wrapper or a hook."""

import pytest
import torch
from torch import nn

from attnzoo.adapters.projections import is_plain, project_by_head
from tests.support.weights import LowRank

HEADS, DIM, WIDTH = 4, 2, 6
HOOKS = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, inputs, outputs: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, outputs: None),
}


def linear(bias):
    torch.manual_seed(1)
    return nn.Linear(WIDTH, HEADS * DIM, bias=bias)


def assert_projects_each_head(layer):
    states = torch.randn(2, HEADS, 3, WIDTH)
    expected = torch.stack([layer(states[:, h])[..., h * DIM : (h + 1) * DIM] for h in range(HEADS)], dim=1)
    torch.testing.assert_close(project_by_head(layer, states, HEADS), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrap", [lambda layer: layer, LowRank], ids=["plain", "low rank"])
def test_each_head_gets_its_rows_and_its_bias(bias, wrap):
    assert_projects_each_head(wrap(linear(bias)))


@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS)
def test_a_layer_with_a_hook_is_called(add):
    layer = linear(bias=True)
    assert is_plain(layer)
    handle = add(layer)
    assert not is_plain(layer)
    assert_projects_each_head(layer)
    handle.remove()
    assert is_plain(layer)
