"""A compiled graph runs the Triton kernels, forward and backward."""

import pytest
import torch

import attnzoo
from tests.support.models import FAMILIES


@pytest.mark.parametrize("name", ["gpt_neox"])
def test_a_compiled_model_runs_the_kernels(large_tiles, name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(12, "right", batch=1)
    weight = next(parameter for name, parameter in model.named_parameters() if "query_key_value.weight" in name)
    torch.compiler.reset()
    results = []
    with attnzoo.patch(model, "triton") as handle:
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            logits = run(**inputs)[0]
            results.append([logits, *torch.autograd.grad(logits.square().mean(), [weight])])
        assert {site.kernel for site in handle.sites} == {"triton"}
        assert {site.calls for site in handle.sites} == {2}
    torch.testing.assert_close(results[1], results[0])
