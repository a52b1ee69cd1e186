"""``torch.compile`` around a patched model: what is around the patched modules is compiled, with the same results.

With a compiler backend that runs what is traced, as it is: what is tested is the tracing.
"""

import pytest
import torch

import attnzoo

from ..models.zoo import causal_inputs, gpt_neox, led, led_inputs


def run(model, inputs):
    """Outputs, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), *(gradient.clone() for gradient in gradients)]


@pytest.mark.parametrize(
    ("build", "inputs"), [(gpt_neox, causal_inputs), (led, led_inputs)], ids=["attention function", "forward"]
)
def test_a_patched_model_compiles(build, inputs):
    model = build().eval()
    with attnzoo.patch(model, "sdpa") as handle:
        expected = [run(model, inputs(length, side)) for length, side in ((20, "left"), (33, "right"))]
        calls = handle.sites[0].calls
        compiled = torch.compile(model, backend="eager")
        found = [run(compiled, inputs(length, side)) for length, side in ((20, "left"), (33, "right"))]
        assert handle.sites[0].calls == 2 * calls
    for got, wanted in zip(found, expected, strict=True):
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)
