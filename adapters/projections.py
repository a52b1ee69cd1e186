"""Projections of states that differ from head to head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def project_by_head(layer: Any, states: Tensor, heads: int) -> Tensor:
    """Each head's projection of that head's states, ``(batch, heads, n, width)``: ``(batch, heads, n, head_dim)``.

    A plain linear layer is multiplied head by head with that head's rows of the weight. Any other layer is called, and
    computes all heads of each state: a layer around it (LoRA), a hook, or a quantised weight decides the result.
    """
    if not is_plain(layer):
        projected: Tensor = layer(states)
        return projected.unflatten(-1, (heads, -1)).diagonal(0, 1, 3).movedim(-1, 1)
    by_head = layer.weight.unflatten(0, (heads, -1)).transpose(-1, -2)
    product: Tensor = states @ by_head
    return product if layer.bias is None else product + layer.bias.unflatten(0, (heads, 1, -1))


def is_plain(layer: Any) -> bool:
    """Whether calling a layer does nothing but multiply by its weight and add its bias.

    Wrappers, quantisation and parametrisation change the type of the layer or of its weight; accelerate sets a forward
    on the instance. torch has no public way to ask for hooks, a module's own or those of all modules; if the private
    one is gone, no layer is plain.
    """
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    hooked_everywhere = getattr(torch_module, "_has_any_global_hook", lambda: True)()
    own = (getattr(layer, name, True) for name in ("_forward_hooks", "_forward_pre_hooks"))
    own_backward = (getattr(layer, name, True) for name in ("_backward_hooks", "_backward_pre_hooks"))
    return not (hooked_everywhere or any(own) or any(own_backward))
