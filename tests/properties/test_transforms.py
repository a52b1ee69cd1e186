"""Under ``torch.func`` a backend equals the oracle on anything: gradients, tangents, batches of attentions."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, note

from attnzoo.conformance.transform_check import CHECKED_TRANSFORMS, check_transform
from attnzoo.registry import registry
from tests.properties.test_backends import attentions


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(attention=attentions(), transform=st.sampled_from(CHECKED_TRANSFORMS))
def test_a_backend_equals_the_oracle_under_transforms(backend, attention, transform):
    made = registry.make_backend(backend)
    note(f"{attention.request()}")
    assert not registry.refusals(made, attention.request())
    verdict = check_transform(attention, made, transform)
    assert verdict.ok, str(verdict)
