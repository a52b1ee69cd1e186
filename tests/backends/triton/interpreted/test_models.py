"""Small models of all families agree with the oracle on the Triton kernels."""

import pytest

import attnzoo
from tests.backends.triton.interpreted.conftest import IS_LONG
from tests.support.models import FAMILIES

pytestmark = pytest.mark.usefixtures("no_overflow_checks")
# The other families use no further form of attention. They run in a long run.
FEW = ("led", "longt5-tglobal", "reformer", "gpt_neox", "gpt_bigcode-mqa")


@pytest.mark.parametrize("name", FAMILIES if IS_LONG else FEW)
def test_model_agrees_with_the_oracle(large_tiles, name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(12, "right", batch=2)
    report = attnzoo.verify(model, inputs, backend="triton", gradients=False)
    assert report.ok, str(report)
    with attnzoo.patch(model, "triton") as handle:
        model(**inputs)
        assert {site.kernel for site in handle.sites} == {"triton"}


def test_gradients_of_a_model_with_trained_biases(large_tiles):
    family = FAMILIES["longt5-tglobal"]
    report = attnzoo.verify(family.build(), family.inputs(12, "right", batch=1), backend="triton")
    assert report.ok, str(report)
