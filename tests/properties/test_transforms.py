"""Backends agree with the oracle under ``torch.func``: gradients, tangents and batches of drawn attentions."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, note, settings

from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS, check_transform
from attnzoo.registry import registry
from tests.support.drawn_attentions import KINDS, attentions
from tests.support.small_blocks import block_sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@settings(max_examples=settings().max_examples // len(KINDS))
@given(st.data(), st.sampled_from(CHECKED_TRANSFORMS), st.booleans())
def test_backend_agrees_with_the_oracle_under_transforms(backend, kind, data, transform, are_small):
    backend = registry.make_backend(backend)
    attention = data.draw(attentions(backend.capabilities, kinds=[kind]))
    note(f"{attention.request()}")
    assert not registry.refusals(backend, attention.request())
    with block_sizes(are_small):
        check = check_transform(attention, backend, transform)
    assert check.ok, str(check)
