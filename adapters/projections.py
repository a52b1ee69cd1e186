"""Apply a linear layer to states that differ from head to head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def project_by_head(layer: Any, states: Tensor, heads: int) -> Tensor:
    """Project the states of each head with the rows of a layer's weight that belong to the head.

    If the layer is a plain linear layer, this function multiplies by these rows and does not call the layer. A layer
    with a wrapper (LoRA), a hook or a quantised weight must be called. The call projects each head's states with the
    rows of all heads, and this function discards the results for the other heads.

    Args:
        layer: a linear layer from ``width`` to ``heads * head_dim`` features.
        states: ``(batch, heads, n, width)``.
        heads: the number of heads.

    Returns:
        ``(batch, heads, n, head_dim)``.
    """
    if not is_plain(layer):
        projected: Tensor = layer(states)
        return projected.unflatten(-1, (heads, -1)).diagonal(0, 1, 3).movedim(-1, 1)
    by_head = layer.weight.unflatten(0, (heads, -1)).transpose(-1, -2)
    product: Tensor = states @ by_head
    return product if layer.bias is None else product + layer.bias.unflatten(0, (heads, 1, -1))


def is_plain(layer: Any) -> bool:
    """Whether calling a layer only multiplies by its weight and adds its bias.

    Wrappers, quantisation and parametrisation change the type of the layer or of its weight. accelerate's hooks show as
    an attribute ``forward`` of the instance. torch has no public function that lists torch's hooks, so this function
    reads private attributes. If torch removes these attributes, the result is False for every layer.
    """
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    hooked_everywhere = getattr(torch_module, "_has_any_global_hook", lambda: True)()
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not (hooked_everywhere or any(getattr(layer, kind, True) for kind in kinds))
