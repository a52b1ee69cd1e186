"""Layers that must be called and not multiplied by their weight: quantised layers, and layers inside LoRA."""

from __future__ import annotations

import warnings

import torch
from torch import nn

_ALLOWED = ("__get__", "__repr__", "detach", "requires_grad_", "is_floating_point", "size", "dim", "numel")


class Packed(torch.Tensor):
    """A weight like torchao's quantised tensors: it supports only ``linear()`` and has a shape, dtype and device."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.packed = weight

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].packed, *args[2:], **(kwargs or {}))
        if getattr(function, "__name__", "") in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise NotImplementedError(f"packed weight: {getattr(function, '__name__', function)} is not implemented")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Packed(args[0].packed)
        raise NotImplementedError(f"packed weight: {function} is not implemented")


def pack(model):
    """Pack the weights of all linear layers. The layers stay plain ``nn.Linear``."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Packed(module.weight.data), requires_grad=False)
    return model


def quantise(model):
    """Apply PyTorch's dynamic quantisation, which replaces linear layers by modules without parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class LowRank(nn.Module):
    """A low-rank adapter (LoRA) around a linear layer, with the attributes of that layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        random = torch.Generator().manual_seed(5)
        dtype = base.weight.dtype
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=random, dtype=dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=random, dtype=dtype))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, states):
        return self.base(states) + states @ self.down.T @ self.up.T
