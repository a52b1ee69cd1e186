"""Refusals list every reason, ``auto`` selects a backend, and a requested backend is never replaced."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo import BackendRefusedError, InvalidArgumentError, Refusal
from attnzoo.registry import Registry, registry
from tests.support.fake_backends import fake_backend, small_inputs

pytestmark = pytest.mark.usefixtures("isolated_registry")


def test_a_refusal_lists_every_reason_and_the_alternatives():
    cls = fake_backend(
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
        Refusal("key heads", "2", "4, like the query"),
        Refusal("key_mask", "True", "no key mask"),
        Refusal("mask", "True", "no dense mask"),
        Refusal("value_dim", "5", "8, the head_dim"),
        Refusal("dropout", "True", "dropout=0.0, or a model in eval mode"),
        Refusal("grad", "True", "torch.no_grad(), or inputs that do not require grad"),
    )
    error = caught.value
    assert error.backend == "narrow"
    assert set(error.refusals["attention"]) == set(expected)
    assert len(error.refusals["attention"]) == len(expected)
    for refusal in expected:
        assert f"{refusal.field}: got {refusal.got}; allowed: {refusal.allowed}" in str(error)
    assert "narrow" not in error.alternatives["attention"]
    assert {"eager", "sdpa"} <= set(error.alternatives["attention"])
    assert "backends that support it: " in str(error)
    assert cls.runs == []


def test_an_unavailable_backend_is_refused_with_exact_alternatives_only():
    attnzoo.register_backend(fake_backend("elsewhere", why_not="no such card", dtypes=frozenset({torch.float16})))
    with pytest.raises(BackendRefusedError) as caught:
        attnzoo.attention(**small_inputs(), backend="elsewhere")
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
    only = registry_of(fake_backend("narrow", gqa=False))
    with registry.replaced_by(only), pytest.raises(BackendRefusedError, match="backends that support it: none"):
        attnzoo.attention(torch.randn(1, 4, 3, 8), *torch.randn(2, 1, 2, 3, 8), backend="narrow")


def test_auto_selects_the_supporting_backend_of_highest_priority():
    best = attnzoo.register_backend(fake_backend("best", priority=1000, patterns=frozenset({attnzoo.Full})))
    second = attnzoo.register_backend(fake_backend("second", priority=999))
    attnzoo.attention(**small_inputs())
    assert (len(best.runs), len(second.runs)) == (1, 0)
    attnzoo.attention(**small_inputs(), pattern=attnzoo.Causal())
    assert (len(best.runs), len(second.runs)) == (1, 1)
    attnzoo.unregister_backend("best")
    attnzoo.attention(**small_inputs())
    assert (len(best.runs), len(second.runs)) == (1, 2)
    attnzoo.register_backend(best)
    attnzoo.attention(**small_inputs())
    assert (len(best.runs), len(second.runs)) == (2, 2)


def test_auto_never_selects_an_approximate_backend():
    changing = attnzoo.register_backend(fake_backend("changing", priority=1000, exact=False))
    attnzoo.attention(**small_inputs())
    assert changing.runs == []
    assert not attnzoo.backends()["changing"].exact


def test_auto_lists_the_reasons_of_every_candidate():
    only = registry_of(
        fake_backend("first", patterns=frozenset({attnzoo.Full})),
        fake_backend("second", dtypes=frozenset({torch.float64})),
    )
    with registry.replaced_by(only), pytest.raises(BackendRefusedError) as caught:
        attnzoo.attention(**small_inputs(), pattern=attnzoo.Causal())
    message = str(caught.value)
    assert "'first'" in message
    assert "pattern: got Causal(offset=None); allowed: Full" in message
    assert "'second'" in message
    assert "dtype: got float32; allowed: float64" in message
    assert "backends that support it" not in message, "every candidate is listed already"


def test_a_requested_backend_is_never_replaced():
    narrow = attnzoo.register_backend(fake_backend("narrow", priority=1000, patterns=frozenset({attnzoo.Full})))
    with pytest.raises(BackendRefusedError):
        attnzoo.attention(**small_inputs(), pattern=attnzoo.Causal(), backend="narrow")
    assert narrow.runs == []


def test_auto_ignores_a_backend_with_a_required_option():
    @dataclass(frozen=True)
    class Demanding(fake_backend("base", priority=1000)):
        window: int
        name: ClassVar[str] = "demanding"
        priority: ClassVar[int] = 1000

    attnzoo.register_backend(Demanding)
    attnzoo.attention(**small_inputs())  # auto does not know a value for the option
    with pytest.raises(InvalidArgumentError, match="window"):
        attnzoo.attention(**small_inputs(), backend="demanding")
