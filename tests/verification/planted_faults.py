"""Backends with one fault each, and how ``verify`` detects them on the trained checkpoints in float32.

    python -m tests.verification.planted_faults        # prints the table of docs/decisions.md

The table shows error / budget of the worst check, with and without the budget term for scores that are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import attnzoo
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.conformance.error_rule import Check, allowed_error, factor
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.patterns import Causal, Chunks, Window
from attnzoo.spec.segments import Attention
from attnzoo.verification.reports import Report
from tests.support.checkpoints import load, passage

SMALL = 1.01


class _ScaledGradient(torch.autograd.Function):
    """The identity function with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx, tensor, by):
        ctx.by = by
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.by, None


def scale_gradient(tensor, by=SMALL):
    return _ScaledGradient.apply(tensor, by)


@dataclass(frozen=True)
class Fault:
    """A backend with one fault.

    Attributes:
        what: description of the fault.
        family: the checkpoint that shows the fault.
        spoil: maps an attention to the attention that is computed instead; None: the fault does not apply to it.
        after: maps an output and its attention to the output that is returned instead.
        padded: whether the inputs are two samples, one of them padded.
        gradient_only: whether the outputs are right and only gradients are wrong.
    """

    what: str
    family: str
    spoil: Callable[[Attention], Attention | None] = lambda attention: attention
    after: Callable[[torch.Tensor, Attention], torch.Tensor] = lambda output, attention: output
    padded: bool = False
    gradient_only: bool = False

    @property
    def backend(self) -> type[attnzoo.Backend]:
        fault = self

        @dataclass(frozen=True)
        class Faulty(attnzoo.Backend):
            name: ClassVar[str] = "faulty"
            capabilities: ClassVar[attnzoo.Capabilities] = SdpaBackend.capabilities

            def run(self, attention, probabilities=False):
                spoiled = fault.spoil(attention)
                result = SdpaBackend().run(attention if spoiled is None else spoiled)
                return result if spoiled is None else result._replace(output=fault.after(result.output, attention))

        return Faulty

    def report(self) -> Report:
        """The report of ``verify`` on the faulty backend."""
        return attnzoo.verify(load(self.family), passage(self.family, padded=self.padded), self.backend())


def _first(attention, **changes):
    head, *rest = attention.segments
    return replace(attention, segments=(replace(head, **changes), *rest))


def _scaled_gradient_of(name):
    return lambda attention: _first(attention, **{name: scale_gradient(getattr(attention.segments[0], name))})


def _fewer_segments(attention):
    return replace(attention, segments=attention.segments[:1]) if len(attention.segments) > 1 else None


def _bias(change):
    def spoil(attention):
        bias = attention.segments[0].bias
        if not isinstance(bias, RelativeBias):
            return None
        return _first(attention, bias=replace(bias, values=change(bias.values, bias.zero)))

    return spoil


def _entry(values, zero):
    factors = torch.ones_like(values)
    factors[0, zero - 1] = SMALL
    return values * factors


def _narrower(attention):
    pattern = attention.segments[0].pattern
    return _first(attention, pattern=Window(pattern.left - 1, pattern.right)) if isinstance(pattern, Window) else None


def _shifted(attention):
    pattern = attention.segments[0].pattern
    return _first(attention, pattern=Causal(offset=-1)) if isinstance(pattern, Causal) else None


def _no_neighbour(attention):
    pattern = attention.segments[0].pattern
    if type(pattern) is not Chunks:
        return None
    return _first(attention, pattern=replace(pattern, before=pattern.before - 1))


def _no_padding(attention):
    seen = attention.segments[0].key_mask
    if seen is None:
        return None
    return _first(attention, key_mask=torch.cat([seen[:1], torch.ones_like(seen[1:])]))


def _last_row(output, attention):
    return torch.cat([output[:, :, :-1], output[:, :, -1:] * SMALL], dim=2)


def _padding_rows(output, attention):
    shown = attention.query_mask
    return output if shown is None else output + 1e-3 * ~shown[:, None, :, None]


def _global_rows(output, attention):
    return output * SMALL if attention.q_len == 1 else output


def _swapped(attention):
    value = attention.segments[0].value
    order = [1, 0, *range(2, value.shape[1])]
    return _first(attention, value=value[:, order]) if value.shape[1] > 1 else None


def _coarse(attention):
    """Queries and keys with the 11 significant bits of TF32."""

    def rounded(tensor):
        return tensor.half().to(tensor.dtype)

    segments = tuple(replace(segment, key=rounded(segment.key)) for segment in attention.segments)
    return replace(attention, query=rounded(attention.query), segments=segments)


def _stale_key(attention):
    key = attention.segments[0].key
    index = torch.arange(key.shape[2])
    index[5] = 4
    return _first(attention, key=key[:, :, index]) if key.shape[2] > 5 else None


def _query(attention):
    return replace(attention, query=scale_gradient(attention.query))


def _query_row(attention):
    by = torch.ones(attention.q_len, 1)
    by[attention.q_len // 2] = SMALL
    return replace(attention, query=scale_gradient(attention.query, by))


FAULTS = (
    Fault("one entry of a bias table off by 1 %", "longt5", _bias(_entry)),
    Fault("window one key too short", "led", _narrower),
    Fault("global keys dropped", "led", _fewer_segments),
    Fault("scale off by 1 %", "gpt_neox", lambda a: replace(a, scale=a.scale * SMALL)),
    Fault("causal mask one key late", "gpt_bigcode", _shifted),
    Fault("last row off by 1 %", "gpt_neox", after=_last_row),
    Fault("padding queries not zero (1e-3)", "led", after=_padding_rows, padded=True),
    Fault("second request (global rows) off by 1 %", "led", after=_global_rows),
    Fault("key padding of one sample dropped", "longt5", _no_padding, padded=True),
    Fault("value heads swapped", "gpt_neox", _swapped),
    Fault("chunk before not seen", "reformer", _no_neighbour),
    Fault("one hash round dropped", "reformer", _fewer_segments),
    Fault("one key is its neighbour's", "gpt_bigcode", _stale_key),
    Fault("queries and keys rounded as TF32", "gpt_neox", _coarse),
    Fault("gradient of a bias table off by 1 %", "longt5", _bias(lambda v, _: scale_gradient(v)), gradient_only=True),
    Fault("gradient of the query off by 1 %", "gpt_neox", _query, gradient_only=True),
    Fault("gradient of one query row off by 1 %", "gpt_neox", _query_row, gradient_only=True),
    Fault("gradient of the keys off by 1 %", "led", _scaled_gradient_of("key"), gradient_only=True),
    Fault("gradient of the values off by 1 %", "gpt_bigcode", _scaled_gradient_of("value"), gradient_only=True),
)  # fmt: skip


def share_without_term(check: Check) -> float:
    """Error / budget of a check, if the budget had no term for scores that are computed again."""
    budget = allowed_error(factor(check.what), check.eager_error, check.scale, torch.float32)
    return check.error / budget if budget else math.inf


def shares(report: Report) -> tuple[float, float]:
    """Error / budget of the worst check of an attention, with and without the term for scores computed again."""
    checks = [check for site in report.sites for check in site.checks]
    return max(check.share for check in checks), max(map(share_without_term, checks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| fault | checkpoint | error over budget | without the term |")
    print("|---|---|--:|--:|")
    for fault in FAULTS:
        with_term, without_term = shares(fault.report())
        print(f"| {fault.what} | {fault.family} | {with_term:,.0f} | {without_term:,.0f} |", flush=True)
