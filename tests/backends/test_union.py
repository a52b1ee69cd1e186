"""The union on a kernel in plain torch: parts in any order give the softmax over all keys, and its gradients."""

from functools import partial
from typing import NamedTuple

import torch

from attnzoo.backends.common.union import PartialKernel, unite


class Part(NamedTuple):
    segment: int
    keys: slice

    def add(self, tensor, values):
        tensor[self.keys] += values


class Rows(NamedTuple):
    """Query rows ``(n, dim)`` from ``start`` to ``stop``."""

    queries: slice
    parts: tuple[Part, ...]

    def take(self, tensor):
        return tensor[self.queries]

    def put(self, tensor, values):
        tensor[self.queries] = values

    def add(self, tensor, values):
        tensor[self.queries] += values


class PlainKernel(PartialKernel):
    """Attention of ``(n, dim)`` tensors with scale 1."""

    def __init__(self, plan, query, tensors):
        self.plan, self.places, self.query, self.tensors = plan, range(4), query, tensors

    def new_results(self):
        return torch.zeros_like(self.query), self.query.new_full(self.query.shape[:1], float("-inf"))

    def forward_plan(self):
        return self.plan

    def keys_of(self, part):
        return [tensor[part.keys] for tensor in self.keys_values(part.segment)]

    def forward(self, rows, number):
        key, value = self.keys_of(rows.parts[number])
        scores = rows.take(self.query) @ key.T
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    def backward(self, rows, grad_out, out, lse):
        query = rows.take(self.query)
        for part in rows.parts:
            key, value = self.keys_of(part)
            weights = (query @ key.T - lse[:, None]).exp()
            grad_scores = weights * (grad_out @ value.T - (grad_out * out).sum(-1, keepdim=True))
            yield grad_scores @ key, grad_scores.T @ query, weights.T @ grad_out


def test_a_union_of_parts_is_the_softmax_over_all_keys():
    query, *tensors = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5, 3, 3))
    first, second, other = Part(0, slice(0, 2)), Part(0, slice(2, 5)), Part(1, slice(0, 3))
    plan = [
        (True, Rows(slice(0, 4), (first, other))),
        (True, Rows(slice(4, 5), ())),
        (False, Rows(slice(2, 5), (second,))),
    ]
    output, lse = unite(partial(PlainKernel, plan), query, tensors)

    visible = torch.zeros(6, 8, dtype=torch.bool)
    visible[0:4, [0, 1, 5, 6, 7]] = True
    visible[2:5, 2:5] = True
    scores = query @ torch.cat(tensors[0::2]).T
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    expected = weights @ torch.cat(tensors[1::2])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, scores.masked_fill(~visible, float("-inf")).logsumexp(-1))
    cotangent = torch.randn_like(output)
    leaves = [query, *tensors]
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent.masked_fill(~visible.any(-1, keepdim=True), 0.0)),
    )


class HalfKernel(PlainKernel):
    """A kernel that computes parts in half precision, and sums them in float32."""

    def new_results(self):
        return torch.zeros(self.query.shape), torch.full(self.query.shape[:1], float("-inf"))

    def forward(self, rows, number):
        out, lse = super().forward(rows, number)
        return out, lse.float()


def test_parts_in_half_precision_are_merged_in_the_dtype_of_their_sum():
    query, *tensors = (torch.randn(n, 4) for n in (6, 5, 5, 3, 3))
    plan = [(number == 0, Rows(slice(0, 6), (Part(number, slice(0, 5)),))) for number in (0, 1)]
    halves = [tensor.bfloat16() for tensor in (query, *tensors)]
    output, _ = unite(partial(HalfKernel, plan), halves[0], halves[1:])
    query, *tensors = (half.double() for half in halves)
    expected = (query @ torch.cat(tensors[0::2]).T).softmax(-1) @ torch.cat(tensors[1::2])
    torch.testing.assert_close(output.double(), expected, rtol=0.03, atol=0.03)
