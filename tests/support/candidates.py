"""Candidates for checks: backends that are wrong in one place, and right backends with other rounding errors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import attnzoo
from attnzoo.backends.eager import EagerBackend, evaluate, grid, joined_values
from attnzoo.spec.segments import Attention
from tests.verification.planted_faults import scale_gradient


@dataclass(frozen=True)
class Candidate(attnzoo.Backend):
    """``eager`` that computes another attention (``before``) or changes the output (``after``)."""

    before: Callable[[Attention], Attention] = lambda attention: attention
    after: Callable[[Tensor, Attention], Tensor] = lambda output, attention: output

    name: ClassVar[str] = "candidate"
    capabilities: ClassVar[attnzoo.Capabilities] = replace(EagerBackend.capabilities, transforms=frozenset())

    def run(self, attention, probabilities=False):
        result = EagerBackend().run(self.before(attention), probabilities)
        return result._replace(output=self.after(result.output, attention))


def candidate(compute):
    """A backend whose output is ``compute(attention)``."""
    return Candidate(after=lambda output, attention: compute(attention))


def with_segment(index, **changes):
    """A function that changes fields of one segment. Values are functions of the field."""

    def before(attention):
        segments = list(attention.segments)
        if index >= len(segments):
            return attention
        fields = {name: change(getattr(segments[index], name)) for name, change in changes.items()}
        segments[index] = replace(segments[index], **fields)
        return replace(attention, segments=tuple(segments))

    return before


def with_fields(**changes):
    """A function that changes fields of the attention. Values are functions of the field."""
    return lambda a: replace(a, **{name: change(getattr(a, name)) for name, change in changes.items()})


def only_if(applies, before):
    """A backend that changes only the attentions for which ``applies`` is true."""
    return Candidate(lambda attention: before(attention) if applies(attention) else attention)


def changes_in_place(choose):
    """A backend that computes the right output and then changes a tensor of its inputs."""

    @torch.no_grad()
    def after(output, attention):
        tensor = choose(attention)
        if tensor is not None:
            tensor.logical_not_() if tensor.dtype == torch.bool else tensor.mul_(2.0)
        return output

    return Candidate(after=after)


def scaled_at(place, roundings=64):
    """A function that makes one place of an output larger by some units in the last place."""

    def after(output, attention):
        factors = torch.ones_like(output)
        factors[place] += roundings * torch.finfo(output.dtype).eps
        return output * factors

    return after


softer = with_fields(scale=lambda scale: scale * 0.99)


def gradient_at(place=..., by=1.01):
    """A function that returns an equal tensor, and multiplies one place of the gradient by a factor."""

    def change(tensor):
        copy = tensor.clone()
        copy[place] = scale_gradient(tensor[place], by)
        return copy

    return change


def of_bias(change):
    """A function that changes the values of a bias."""
    return lambda bias: None if bias is None else replace(bias, values=change(bias.values))


def normalised_last(attention, exponential=torch.exp, factor=1.0):
    """The output of a softmax that divides after the product with the values, in float32 or the wider dtype."""
    dtype = attention.query.dtype
    wide = attention.with_tensors(tuple(t.to(torch.promote_types(dtype, torch.float32)) for t in attention.tensors()))
    scores, seen = grid(wide, torch.arange(attention.q_len))
    sees_any = seen.any(-1, keepdim=True)
    scores = scores * factor
    highest = scores.detach().masked_fill(~seen, float("-inf")).amax(-1, keepdim=True).masked_fill(~sees_any, 0.0)
    weights = exponential((scores - highest).masked_fill(~seen, 0.0)) * seen
    output = weights @ joined_values(wide) / weights.sum(-1, keepdim=True).masked_fill(~sees_any, 1.0)
    return wide.fill(output, sees_any.squeeze(-1)).to(dtype)


def with_permuted_components(attention):
    """The same attention whose products of query and key are summed in another order."""
    order = torch.randperm(attention.head_dim, generator=torch.Generator().manual_seed(1))
    segments = tuple(replace(segment, key=segment.key[..., order]) for segment in attention.segments)
    return replace(attention, query=attention.query[..., order], segments=segments)


def with_scale_in(*, query, key):
    """A function that multiplies the query and the keys by powers of the scale, instead of the scores."""

    def before(attention):
        segments = tuple(replace(s, key=s.key * attention.scale**key) for s in attention.segments)
        return replace(attention, query=attention.query * attention.scale**query, segments=segments, scale=1.0)

    return before


def computed_in(dtype):
    """A backend that computes in another dtype and returns the dtype of the query."""

    def compute(attention):
        other = attention.with_tensors(tuple(tensor.to(dtype) for tensor in attention.tensors()))
        return evaluate(other).output.to(attention.query.dtype)

    return candidate(compute)
