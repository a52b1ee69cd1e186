"""Compare a backend with the oracle under ``torch.func``: gradients, tangents and batches of attentions.

The oracle uses no transform: autograd computes gradients, and a loop computes batches. A tangent ``J t`` of the output
(``J``: Jacobian, ``t``: input tangents) is computed as the derivative of ``t . (J^T v)`` with respect to ``v``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate
from attnzoo.conformance import error_rule
from attnzoo.conformance.error_rule import Check
from attnzoo.functional import execute
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.segments import Attention

# "vmap of grad" computes one gradient per sample.
CHECKED_TRANSFORMS = ("grad", "jvp", "vmap", "vmap of grad")

_Compute = Callable[[Attention], Tensor]


def check_transform(attention: Attention, backend: Backend, transform: str, seed: int = 0) -> Check:
    """Run an attention on a backend under one of :data:`CHECKED_TRANSFORMS`, and compare the result with the oracle.

    Only tensors that require grad have gradients and tangents. ``vmap`` maps over two attentions. All tensors and masks
    differ between the two. ``seed`` is the seed of the random cotangent and tangents.

    Raises:
        BackendRefusedError: the backend does not support the transform.
    """
    dtype = attention.query.dtype
    plain_dtype = error_rule.plain_dtype(dtype)

    def evaluate_rewritten(part: Attention) -> Tensor:
        return evaluate(backend.rewrite(part, backend.decisions(part))).output

    got = _Run(attention, dtype, seed).with_transform(transform, lambda part: execute(backend, part).output)
    reference, eager = (
        _Run(attention, kind, seed).without_transform(transform, evaluate_rewritten)
        for kind in (torch.float64, plain_dtype)
    )
    if got.dtype != dtype:
        return Check(f"{transform}: dtype of the result: got {got.dtype}; allowed: {dtype}", math.inf, 0.0, 0.0, 0.0)
    k = error_rule.FORWARD if transform == "vmap" else error_rule.GRADIENT
    return error_rule.check(transform, got, reference, eager, k, eager_dtype=plain_dtype)


class _Run:
    """An attention in one dtype, a random cotangent of the output, and random tangents of the inputs."""

    def __init__(self, attention: Attention, dtype: torch.dtype, seed: int) -> None:
        tensors = attention.tensors()
        self._requires_grad = [tensor.requires_grad for tensor in tensors]
        # The copies are contiguous, because PyTorch cannot write tangents in the layout of an expanded tensor.
        plain = (tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format) for tensor in tensors)
        self._attention = attention = attention.with_tensors(tuple(plain))
        random = torch.Generator().manual_seed(seed)

        def draw(shape: Sequence[int]) -> Tensor:
            drawn = torch.randn(tuple(shape), generator=random, dtype=torch.float64, device="cpu")
            return drawn.to(device=attention.query.device, dtype=dtype)

        self._cotangent = draw((attention.batch, attention.heads, attention.q_len, attention.value_dim))
        self._tangents = [draw(tensor.shape) for tensor in self._leaves(attention)]

    def _leaves(self, attention: Attention) -> tuple[Tensor, ...]:
        pairs = zip(attention.tensors(), self._requires_grad, strict=True)
        return tuple(tensor for tensor, requires_grad in pairs if requires_grad)

    def _with_leaves(self, attention: Attention, leaves: tuple[Tensor, ...]) -> Attention:
        rest = iter(leaves)
        pairs = zip(attention.tensors(), self._requires_grad, strict=True)
        return attention.with_tensors(tuple(next(rest) if requires_grad else tensor for tensor, requires_grad in pairs))

    def with_transform(self, transform: str, compute: _Compute) -> Tensor:
        """Return the gradient, tangent or batched output under the transform as one tensor."""
        if transform == "jvp":

            def of_leaves(*leaves: Tensor) -> Tensor:
                return compute(self._with_leaves(self._attention, leaves))

            tangent: Tensor = torch.func.jvp(of_leaves, self._leaves(self._attention), tuple(self._tangents))[1]
            return tangent
        if transform.endswith("grad"):
            compute = partial(self._gradient_by_func, compute)
        return self._mapped(compute) if transform.startswith("vmap") else compute(self._attention)

    def _gradient_by_func(self, compute: _Compute, attention: Attention) -> Tensor:
        def loss(leaves: tuple[Tensor, ...]) -> Tensor:
            return (compute(self._with_leaves(attention, leaves)) * self._cotangent).sum()

        return torch.cat([grad.flatten() for grad in torch.func.grad(loss)(self._leaves(attention))])

    def _mapped(self, compute: _Compute) -> Tensor:
        stacked = [torch.stack(pair) for pair in zip(*map(_every_tensor, self._pair()), strict=True)]
        mapped: Tensor = torch.func.vmap(lambda tensors: compute(_with_every_tensor(self._attention, tensors)))(stacked)
        return mapped

    def _pair(self) -> tuple[Attention, Attention]:
        flipped = [tensor.flip(-1) for tensor in _every_tensor(self._attention)]
        return self._attention, _with_every_tensor(self._attention, flipped)

    def without_transform(self, transform: str, compute: _Compute) -> Tensor:
        """Return the same tensor as :meth:`with_transform`, computed without ``torch.func``."""
        if transform == "jvp":
            leaves = tuple(tensor.requires_grad_() for tensor in self._leaves(self._attention))
            output = compute(self._with_leaves(self._attention, leaves))
            direction = torch.zeros_like(output, requires_grad=True)
            grads = torch.autograd.grad(output, leaves, direction, create_graph=True, allow_unused=True)
            pairs = zip(grads, self._tangents, strict=True)
            along = [(grad * tangent).sum() for grad, tangent in pairs if grad is not None]
            return torch.autograd.grad(torch.stack(along).sum(), direction)[0]
        if transform.endswith("grad"):
            compute = partial(self._gradient, compute)
        return (
            torch.stack(list(map(compute, self._pair()))) if transform.startswith("vmap") else compute(self._attention)
        )

    def _gradient(self, compute: _Compute, attention: Attention) -> Tensor:
        leaves = tuple(tensor.clone().requires_grad_() for tensor in self._leaves(attention))
        output = compute(self._with_leaves(attention, leaves))
        grads = torch.autograd.grad(output, leaves, self._cotangent, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])


def _every_tensor(attention: Attention) -> list[Tensor]:
    """Return all tensors of an attention: first :meth:`Attention.tensors`, then the masks and the bias positions."""
    tensors = [*attention.tensors(), attention.query_mask]
    for segment in attention.segments:
        tensors += [segment.key_mask, segment.mask]
        if isinstance(segment.bias, RelativeBias):
            tensors.append(segment.bias.positions)
    return [tensor for tensor in tensors if tensor is not None]


def _with_every_tensor(attention: Attention, tensors: list[Tensor]) -> Attention:
    """Return a copy of the attention with new tensors, given in the order of :func:`_every_tensor`."""
    count = len(attention.tensors())
    attention, rest = attention.with_tensors(tuple(tensors[:count])), iter(tensors[count:])

    def other(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else next(rest)

    attention, segments = replace(attention, query_mask=other(attention.query_mask)), []
    for old in attention.segments:
        segment = replace(old, key_mask=other(old.key_mask), mask=other(old.mask))
        if isinstance(segment.bias, RelativeBias):
            segment = replace(segment, bias=replace(segment.bias, positions=other(segment.bias.positions)))
        segments.append(segment)
    return replace(attention, segments=tuple(segments))
