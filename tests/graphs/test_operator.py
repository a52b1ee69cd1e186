"""The operator in a graph computes what the backend computes outside of a graph, with all gradients."""

import gc

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.graphs.flat import flatten
from attnzoo.graphs.operator import NO_SITE, attend_in_graph, register_runner
from attnzoo.spec.bias import DenseBias
from tests.graphs.attentions import ATTENTIONS, tokens


class Site:
    """A runner that counts."""

    def __init__(self, backend=None):
        self.backend, self.calls = backend or EagerBackend(), 0

    def __call__(self, attention):
        self.calls += 1
        return self.backend.run(attention)

    def repeat(self, attention):
        return self.backend.run(attention).output

    def takes(self, attention):
        return not self.backend.refusals(attention.request())


class Spy(EagerBackend):
    """A backend that appends pattern, mask and bias of its attentions to a list."""

    def __init__(self, seen):
        object.__setattr__(self, "seen", seen)

    def run(self, attention, probabilities=False):
        self.seen.extend((segment.pattern, segment.mask, segment.bias) for segment in attention.segments)
        return super().run(attention, probabilities)


def trained(attention):
    """A copy of an attention whose tensors all require a gradient."""
    leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in attention.tensors()}
    return attention.with_tensors(tuple(leaves[id(tensor)] for tensor in attention.tensors())), list(leaves.values())


def compiled(site, backend="aot_eager"):
    number = register_runner(site)
    torch.compiler.reset()
    return torch.compile(lambda attention: attend_in_graph(attention, number, "site"), backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", [EagerBackend(), SdpaBackend()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_output_and_gradients_are_those_of_the_backend(attention, backend):
    if backend.refusals(attention.request()):
        pytest.skip("the backend refuses this attention")
    site, results = Site(backend), []
    for run in (lambda attention: backend.run(attention).output, compiled(site)):
        copy, leaves = trained(attention)
        output = run(copy)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])
    assert site.calls == 1  # the backward computes the attention again, and does not count it


def test_a_tensor_without_gradient_gets_none():
    attention = ATTENTIONS["window"]
    query = attention.query.clone().requires_grad_()
    site = Site()
    run = compiled(site)
    output = run(attention.with_tensors((query, *attention.tensors()[1:])))
    (grad,) = torch.autograd.grad(output.sum(), [query])
    assert grad.abs().max() > 0.0
    with torch.no_grad():
        assert not run(attention).requires_grad


def test_dropout_repeats_its_random_choices_in_the_backward():
    """With values of ones, an output is the sum of the weights that dropout keeps, and so is the gradient's sum."""
    q, k, _ = tokens(8).unbind()
    v = torch.ones_like(q).requires_grad_()
    attention = attnzoo.Attention(q, (attnzoo.Segment(k, v),), 0.5, dropout=0.5)
    site = Site()
    torch.manual_seed(0)
    output = compiled(site)(attention)
    before = torch.get_rng_state()
    (grad,) = torch.autograd.grad(output.sum(), [v])
    torch.testing.assert_close(grad.sum(), output.sum())
    assert torch.equal(torch.get_rng_state(), before)


def test_another_length_needs_no_other_graph():
    site, graphs = Site(), []

    def count(graph, example):
        graphs.append(graph)
        return graph

    run = compiled(site, count)
    for length in (8, 12, 16):
        q, k, v = tokens(length).unbind()
        segments = (attnzoo.Segment(k, v, attnzoo.Causal(offset=0)), attnzoo.Segment(k, v, attnzoo.Causal(offset=-1)))
        attention = attnzoo.Attention(q, segments, 0.5)
        torch.testing.assert_close(run(attention), EagerBackend().run(attention).output)
    assert len(graphs) <= 2


def test_a_dense_mask_is_a_pattern_when_the_graph_runs_on_the_cpu():
    """The graph cannot read the mask. Without the pattern, kernels would compute what it hides."""
    q, k, v = tokens(8).unbind()
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    patterns, site = [], Site()
    site.backend = Spy(patterns)
    segment = attnzoo.Segment(k, v, attnzoo.Full(), None, mask, DenseBias(torch.zeros(1, 1, 8, 8)))
    compiled(site, "eager")(attnzoo.Attention(q, (segment,), 0.5))
    assert patterns == [(attnzoo.Causal(offset=0), None, None)]


def test_a_second_derivative_is_refused():
    attention, leaves = trained(ATTENTIONS["full"])
    site = Site()
    output = compiled(site, "eager")(attention)
    with pytest.raises(attnzoo.BackendRefusedError, match="create_graph: got True; allowed: False"):
        torch.autograd.grad(output.sum(), leaves, create_graph=True)


def test_a_call_after_the_site_was_freed_is_refused():
    site = Site()
    run = compiled(site)
    attention = ATTENTIONS["full"]
    run(attention)
    del site
    gc.collect()
    with pytest.raises(attnzoo.PatchError, match="were freed; allowed: a call while the patched model exists"):
        run(attention)


def test_without_a_site_the_named_backend_runs():
    attention = ATTENTIONS["window"]
    torch.compiler.reset()
    run = torch.compile(lambda given: attend_in_graph(given, NO_SITE, "sdpa"), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(attention), SdpaBackend().run(attention).output)


@pytest.mark.parametrize("name", ["causal", "sides"])
def test_the_operator_keeps_the_rules_of_operators(name):
    """Schema, fake results and gradients are as PyTorch's own checks require."""
    site = Site(SdpaBackend())
    flat = flatten(trained(ATTENTIONS[name])[0])
    torch.library.opcheck(torch.ops.attnzoo.attend, (*flat, register_runner(site), "sdpa"))
