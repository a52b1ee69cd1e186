"""Judging a backend under ``torch.func``: gradients, tangents and batches of attentions against the oracle's.

The oracle's side uses no transform: gradients come from ordinary autograd, a tangent from differentiating a gradient
(``J t`` is the derivative of ``t . (J^T v)`` by ``v``), batches from a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate
from attnzoo.conformance import error_rule
from attnzoo.conformance.error_rule import Check
from attnzoo.functional import execute
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.segments import Attention

# What can be checked: "grad", "jvp" and "vmap" of torch.func, and gradients per sample, which are vmap of grad.
CHECKED = ("grad", "jvp", "vmap", "vmap of grad")


def check_transform(attention: Attention, backend: Backend, transform: str, seed: int = 0) -> Check:
    """Run an attention on a backend under a transform and compare with the float64 oracle under the error rule.

    Gradients and tangents are those of the tensors that require grad. ``vmap`` maps over two attentions at once, which
    differ in all their tensors, masks included.

    Args:
        attention: what to compute, without dropout.
        backend: a configured backend.
        transform: one of :data:`CHECKED`.
        seed: of the cotangent and the tangents.

    Raises:
        BackendRefusedError: the backend does not run under the transform.
    """
    dtype = attention.query.dtype
    narrow = torch.float32 if dtype == torch.float64 else None  # float64 has no wider reference

    def by_definition(one: Attention) -> Tensor:
        return evaluate(backend.rewrite(one, backend.decisions(one))).output

    got = _Run(attention, dtype, seed).transformed(transform, lambda one: execute(backend, one).output)
    reference, eager = (
        _Run(attention, kind, seed).defined(transform, by_definition) for kind in (torch.float64, narrow or dtype)
    )
    k = error_rule.FORWARD if transform == "vmap" else error_rule.GRADIENT
    return error_rule.check(transform, got, reference, eager, k, dtype, narrow)


_Compute = Callable[[Attention], Tensor]


@dataclass
class _Run:
    """One attention in one dtype, with its directions: what to compute, and along what to differentiate."""

    attention: Attention
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        tensors = self.attention.tensors()
        self._learns = [tensor.requires_grad for tensor in tensors]
        # In memory of their own: tangents are written into tensors laid out alike, which expanded ones cannot take.
        plain = (tensor.detach().to(self.dtype).clone(memory_format=torch.contiguous_format) for tensor in tensors)
        self.attention = self.attention.with_tensors(tuple(plain))
        random = torch.Generator().manual_seed(self.seed)
        one = self.attention
        self._cotangent = self._draw((one.batch, one.heads, one.q_len, one.value_dim), random)
        self._tangents = [self._draw(tuple(tensor.shape), random) for tensor in self._leaves(one)]

    def _draw(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        drawn = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
        return drawn.to(device=self.attention.query.device, dtype=self.dtype)

    def _leaves(self, attention: Attention) -> tuple[Tensor, ...]:
        pairs = zip(attention.tensors(), self._learns, strict=True)
        return tuple(tensor for tensor, trains_bias in pairs if trains_bias)

    def _with_leaves(self, attention: Attention, leaves: tuple[Tensor, ...]) -> Attention:
        rest = iter(leaves)
        pairs = zip(attention.tensors(), self._learns, strict=True)
        return attention.with_tensors(tuple(next(rest) if trains_bias else tensor for tensor, trains_bias in pairs))

    # --- under torch.func

    def transformed(self, transform: str, compute: _Compute) -> Tensor:
        """The result of a transform, as one tensor."""
        if transform == "grad":
            return self._gradient_by_func(self.attention, compute)
        if transform == "jvp":

            def of_leaves(*leaves: Tensor) -> Tensor:
                return compute(self._with_leaves(self.attention, leaves))

            tangent: Tensor = torch.func.jvp(of_leaves, self._leaves(self.attention), tuple(self._tangents))[1]
            return tangent
        if transform == "vmap of grad":
            return self._mapped(lambda one: self._gradient_by_func(one, compute))
        return self._mapped(compute)

    def _gradient_by_func(self, attention: Attention, compute: _Compute) -> Tensor:
        def loss(leaves: tuple[Tensor, ...]) -> Tensor:
            return (compute(self._with_leaves(attention, leaves)) * self._cotangent).sum()

        return torch.cat([grad.flatten() for grad in torch.func.grad(loss)(self._leaves(attention))])

    def _mapped(self, compute: _Compute) -> Tensor:
        both = zip(*(_every_tensor(one) for one in self._pair()), strict=True)
        stacked = [torch.stack(pair) for pair in both]
        mapped: Tensor = torch.func.vmap(lambda tensors: compute(_with_every_tensor(self.attention, tensors)))(stacked)
        return mapped

    def _pair(self) -> tuple[Attention, Attention]:
        flipped = [tensor.flip(-1) for tensor in _every_tensor(self.attention)]
        return self.attention, _with_every_tensor(self.attention, flipped)

    # --- by definition

    def defined(self, transform: str, compute: _Compute) -> Tensor:
        """What the transform means, computed without ``torch.func``."""
        if transform == "grad":
            return self._gradient(self.attention, compute)
        if transform == "jvp":
            leaves = tuple(tensor.requires_grad_() for tensor in self._leaves(self.attention))
            output = compute(self._with_leaves(self.attention, leaves))
            direction = torch.zeros_like(output, requires_grad=True)
            grads = torch.autograd.grad(output, leaves, direction, create_graph=True, allow_unused=True)
            pairs = zip(grads, self._tangents, strict=True)
            along = [(grad * tangent).sum() for grad, tangent in pairs if grad is not None]
            return torch.autograd.grad(torch.stack(along).sum(), direction)[0]
        compute_one = compute if transform == "vmap" else lambda one: self._gradient(one, compute)
        return torch.stack([compute_one(one) for one in self._pair()])

    def _gradient(self, attention: Attention, compute: _Compute) -> Tensor:
        leaves = tuple(tensor.clone().requires_grad_() for tensor in self._leaves(attention))
        output = compute(self._with_leaves(attention, leaves))
        grads = torch.autograd.grad(output, leaves, self._cotangent, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])


def _every_tensor(attention: Attention) -> list[Tensor]:
    """All tensors of an attention: those a gradient may flow to, then masks and positions."""
    found = [*attention.tensors(), attention.query_mask]
    for segment in attention.segments:
        found += [segment.key_mask, segment.mask]
        if isinstance(segment.bias, RelativeBias):
            found.append(segment.bias.positions)
    return [tensor for tensor in found if tensor is not None]


def _with_every_tensor(attention: Attention, tensors: list[Tensor]) -> Attention:
    """The same attention on other tensors, in the order of :func:`_every_tensor`."""
    count = len(attention.tensors())
    attention, rest = attention.with_tensors(tuple(tensors[:count])), iter(tensors[count:])

    def other(tensor: Tensor | None, rest: Iterator[Tensor] = rest) -> Tensor | None:
        return None if tensor is None else next(rest)

    attention, segments = replace(attention, query_mask=other(attention.query_mask)), []
    for old in attention.segments:
        segment = replace(old, key_mask=other(old.key_mask), mask=other(old.mask))
        if isinstance(segment.bias, RelativeBias):
            segment = replace(segment, bias=replace(segment.bias, positions=other(segment.bias.positions)))
        segments.append(segment)
    return replace(attention, segments=tuple(segments))
