"""Backends agree with the oracle under ``torch.func``: gradients, tangents and batches of drawn attentions."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, note

from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS, check_transform
from attnzoo.registry import registry
from tests.support.drawn_attentions import attentions


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(attention=attentions(), transform=st.sampled_from(CHECKED_TRANSFORMS))
def test_backend_agrees_with_the_oracle_under_transforms(backend, attention, transform):
    backend = registry.make_backend(backend)
    note(f"{attention.request()}")
    assert not registry.refusals(backend, attention.request())
    check = check_transform(attention, backend, transform)
    assert check.ok, str(check)
