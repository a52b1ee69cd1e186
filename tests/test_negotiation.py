"""Refusals list every reason, ``auto`` selects a backend, and a requested backend is never replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, InvalidArgumentError, Refusal
from attnzoo.registry import Registry, registry
from tests.support.fake_backends import backend, small

pytestmark = pytest.mark.usefixtures("registry_of_its_own")


def test_a_refusal_lists_every_reason_and_the_alternatives():
    cls = backend(
        "narrow", devices=frozenset({"cuda"}), dtypes=frozenset({torch.float16}), patterns=frozenset({attnzoo.Full}),
        segments=1, key_mask=False, mask=False, bias=frozenset(), gqa=False, uneven_value_dim=False, dropout=False,
        grad=False,
    )  # fmt: skip
    attnzoo.register_backend(cls)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5)
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.attention(
            q, k, v, attnzoo.Causal(), torch.zeros(1, 1, 6, 6), dropout=0.1, backend="narrow",
            mask=torch.ones(1, 1, 6, 6, dtype=torch.bool), key_mask=torch.ones(2, 6, dtype=torch.bool),
        )  # fmt: skip
    expected = (
        Refusal("device", "cpu", "cuda"),
        Refusal("dtype", "float32", "float16"),
        Refusal("pattern", "Causal(offset=None)", "Full"),
        Refusal("bias", "dense", "none"),
        Refusal("key heads", "2", "4, the query's"),
        Refusal("key_mask", "requested", "no key mask"),
        Refusal("mask", "requested", "no dense mask"),
        Refusal("value_dim", "5", "8, the head_dim"),
        Refusal("dropout", "requested", "dropout=0.0"),
        Refusal("grad", "requested", "torch.no_grad(), or inputs that do not require grad"),
    )
    error = caught.value
    assert error.backend == "narrow"
    assert set(error.refusals["attention"]) == set(expected)
    assert len(error.refusals["attention"]) == len(expected)
    for refusal in expected:
        assert f"{refusal.field}: got {refusal.got}; allowed: {refusal.allowed}" in str(error)
    assert "narrow" not in error.alternatives["attention"]
    assert {"eager", "sdpa"} <= set(error.alternatives["attention"])
    assert "would run there: " in str(error)
    assert cls.runs == []


def test_an_unavailable_backend_is_refused_with_exact_alternatives_only():
    attnzoo.register_backend(backend("elsewhere", why_not="no such card", dtypes=frozenset({torch.float16})))
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.attention(**small(), backend="elsewhere")
    assert {reason.field for reason in caught.value.refusals["attention"]} == {"availability", "dtype"}
    with pytest.raises(BackendRefusedError, match="availability: got no such card") as unavailable:
        registry.make_backend("elsewhere")
    for error in (caught.value, unavailable.value):
        (others,) = error.alternatives.values()
        assert "sdpa" in others and not {"blocked-local", "lsh"} & set(others)


def registry_of(*classes):
    fresh = Registry(discover=False)
    for cls in classes:
        fresh.register_backend(cls)
    return fresh


def test_a_refusal_without_alternatives_says_so():
    only = registry_of(backend("narrow", gqa=False))
    with registry.replaced_by(only), pytest.raises(BackendRefusedError, match="would run there: no registered backend"):
        attnzoo.attention(torch.randn(1, 4, 3, 8), *torch.randn(2, 1, 2, 3, 8), backend="narrow")


def test_auto_selects_the_supporting_backend_of_highest_priority():
    best = attnzoo.register_backend(backend("best", rank=1000, patterns=frozenset({attnzoo.Full})))
    second = attnzoo.register_backend(backend("second", rank=999))
    attnzoo.attention(**small())
    assert (len(best.runs), len(second.runs)) == (1, 0)
    attnzoo.attention(**small(), pattern=attnzoo.Causal())
    assert (len(best.runs), len(second.runs)) == (1, 1)
    attnzoo.unregister_backend("best")
    attnzoo.attention(**small())
    assert (len(best.runs), len(second.runs)) == (1, 2)
    attnzoo.register_backend(best)
    attnzoo.attention(**small())
    assert (len(best.runs), len(second.runs)) == (2, 2)


def test_auto_never_selects_an_approximate_backend():
    changing = attnzoo.register_backend(backend("changing", rank=1000, exact=False))
    attnzoo.attention(**small())
    assert changing.runs == []
    assert not attnzoo.backends()["changing"].exact


def test_auto_lists_the_reasons_of_every_candidate():
    only = registry_of(
        backend("first", patterns=frozenset({attnzoo.Full})), backend("second", dtypes=frozenset({torch.float64}))
    )
    with registry.replaced_by(only), pytest.raises(BackendRefusedError) as caught:
        attnzoo.attention(**small(), pattern=attnzoo.Causal())
    message = str(caught.value)
    assert "'first'" in message
    assert "pattern: got Causal(offset=None); allowed: Full" in message
    assert "'second'" in message
    assert "dtype: got float32; allowed: float64" in message
    assert "would run there" not in message, "every candidate is listed already"


def test_a_requested_backend_is_never_replaced():
    narrow = attnzoo.register_backend(backend("narrow", rank=1000, patterns=frozenset({attnzoo.Full})))
    with pytest.raises(BackendRefusedError):
        attnzoo.attention(**small(), pattern=attnzoo.Causal(), backend="narrow")
    assert narrow.runs == []


def test_auto_ignores_a_backend_with_a_required_option():
    @dataclass(frozen=True)
    class Demanding(backend("base", rank=1000)):
        window: int
        name: ClassVar[str] = "demanding"
        priority: ClassVar[int] = 1000

    attnzoo.register_backend(Demanding)
    attnzoo.attention(**small())  # auto does not know a value for the option
    with pytest.raises(InvalidArgumentError, match="window"):
        attnzoo.attention(**small(), backend="demanding")
