"""The kit checks the first backend of a new author: no ``gqa``, no masks, and one mistake."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.eager import EagerBackend
from attnzoo.conformance import kit
from attnzoo.conformance.unexercised import unexercised

F32 = torch.float32
HINT = "rows of padding queries must be zero: use Attention.fill"


class Naive(attnzoo.Backend):
    """Full and causal attention in plain operations."""

    name: ClassVar[str] = "naive"
    capabilities: ClassVar[attnzoo.Capabilities] = attnzoo.Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({F32}),
        patterns=frozenset({attnzoo.Full, attnzoo.Causal}),
        grad=True,
    )

    def hidden(self, attention):
        """Which keys are hidden from which queries."""
        (segment,) = attention.segments
        if isinstance(segment.pattern, attnzoo.Full):
            return torch.zeros(attention.q_len, segment.kv_len, dtype=torch.bool)
        return torch.ones(attention.q_len, segment.kv_len).triu(self.diagonal(segment, attention.q_len)).bool()

    def diagonal(self, segment, q_len):
        return segment.pattern.shift(q_len, segment.kv_len) + 1

    def weights(self, attention):
        (segment,) = attention.segments
        scores = attention.query @ segment.key.mT * attention.scale
        hidden = self.hidden(attention)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)

    def run(self, attention, probabilities=False):
        output = self.weights(attention) @ attention.segments[0].value
        return attnzoo.Result(self.filled(attention, output), "naive")

    def filled(self, attention, output):
        return attention.fill(output, ~self.hidden(attention).all(-1))


@pytest.fixture
def short_kit(monkeypatch):
    short = [case for case in testing.cases((F32,)) if case.q_len < 100 and not case.transform]
    monkeypatch.setattr(kit, "cases", lambda dtypes: short)


def unless_offset(self, segment, q_len):
    return 1 if segment.pattern.offset else Naive.diagonal(self, segment, q_len)


def rejected(**methods):
    """Return the message about a naive backend with other methods."""
    with pytest.raises(testing.ConformanceError) as caught:
        testing.check_backend(type("Wrong", (Naive,), methods)(), dtypes=(F32,))
    return str(caught.value)


pytestmark = pytest.mark.usefixtures("short_kit")


def test_kit_accepts_the_right_naive_backend():
    assert not testing.check_backend(Naive(), dtypes=(F32,)).failures


def test_kit_rejects_a_causal_mask_that_ignores_the_cache():
    message = rejected(diagonal=lambda self, segment, q_len: 1)
    for lengths in ("5 x 23", "1 x 23", "23 x 9"):
        assert f"Causal(offset=None), mask none, bias none, 4/4 heads, {lengths}" in message
    assert "Causal(offset=0)" not in message and "Full()" not in message


@pytest.mark.parametrize(
    ("diagonal", "pattern"),
    [
        (lambda self, segment, q_len: segment.kv_len - q_len + 1, "Causal(offset=0)"),
        (unless_offset, "Causal(offset=7)"),
    ],
    ids=["an offset of the cache only", "no offset but 0 and None"],
)
def test_kit_rejects_a_causal_mask_that_ignores_the_offset(diagonal, pattern):
    assert pattern in rejected(diagonal=diagonal)


def test_report_names_the_declared_properties_that_no_case_exercised():
    class Careful(Naive):
        """Declares more than ``refusals`` lets through."""

        capabilities = replace(
            Naive.capabilities,
            patterns=Naive.capabilities.patterns | {attnzoo.Window},
            dtypes=frozenset({F32, torch.bfloat16}),
            **dict(key_mask=True, mask=True, bias=frozenset({"relative"}), dropout=True, gqa=True, softcap=True),
        )

        def refusals(self, request):
            return tuple(dict.fromkeys((*super().refusals(request), *Naive.capabilities.refusals(request))))

    report = testing.check_backend(Careful(), dtypes=(F32,))
    expected = ("pattern Window", "key_mask", "mask", "bias relative", "gqa", "dropout", "softcap", "empty")
    assert report.unexercised == expected
    assert str(report).splitlines()[1] == (
        f"  not exercised by the cases that ran: {', '.join(expected)} (the output of queries that see no key)"
    )


def test_report_names_declared_dtypes_and_gradients_that_no_case_exercised(monkeypatch):
    class Careful(Naive):
        capabilities = replace(Naive.capabilities, dtypes=frozenset({F32, torch.bfloat16}))

        def refusals(self, request):
            inference = replace(Naive.capabilities, grad=False)
            return tuple(dict.fromkeys((*super().refusals(request), *inference.refusals(request))))

    cases = [testing.AttentionCase(dtype, grad=grad) for dtype in (F32, torch.bfloat16) for grad in (False, True)]
    monkeypatch.setattr(kit, "cases", lambda dtypes: cases)
    report = testing.check_backend(Careful(), dtypes=(F32, torch.bfloat16))
    assert report.unexercised == ("dtype bfloat16", "grad")


def test_report_has_no_such_line_if_every_declared_property_ran():
    capabilities, requests = EagerBackend.capabilities, [case.request() for case in testing.cases((F32,))]
    assert unexercised(capabilities, requests, requests) == ()
    assert {"segments", "bias dense", "bias_grad", "probabilities"} < {*unexercised(capabilities, requests, [])}
    assert str(testing.ConformanceReport("eager", ())) == "eager: 0 cases ran, 0 were refused, 0 failed"


def without_fill(self, attention, output):
    return output


def test_failure_in_the_rows_of_padding_queries_names_fill():
    backend = type("Wrong", (Naive,), {"filled": without_fill})()
    failure = testing.run_case(backend, testing.AttentionCase(F32, mask="queries")).failure
    assert failure.startswith("output: error") and failure.endswith(f"FAILS; {HINT}")


def test_failure_in_other_rows_has_no_hint_about_padding():
    def too_small(self, attention, output):
        return Naive.filled(self, attention, output * 0.99)

    backend = type("Wrong", (Naive,), {"filled": too_small})()
    for mask in ("queries", "none"):
        failure = testing.run_case(backend, testing.AttentionCase(F32, mask=mask)).failure
        assert "output: error" in failure and HINT not in failure
