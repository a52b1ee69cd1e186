"""Subjects have the same weights and text in every process; their projections and gradients are complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnzoo.benchmarks.cases import Case, Projections, build
from attnzoo.benchmarks.contenders import dense_bytes
from attnzoo.benchmarks.models import GPT_NEOX, LED, LONGFORMER, LONGT5_LOCAL, PEGASUS_X, WORKLOADS, find_workload
from attnzoo.benchmarks.text import book, read_tokens

CASE = Case("tiny", "model", 40, 1, "float32", "cpu", 1, True)


def test_text_is_long_and_read_as_bytes():
    longest = max(workload.published.get(workload.positions, 0) for workload in WORKLOADS.values())
    assert len(book()) >= 4 * (longest + 1), "four passages without a repetition"
    tokens = read_tokens(2, 100, 4)
    assert bytes((tokens.flatten() - 4).tolist()) == book()[:200]


@pytest.mark.parametrize("workload", [LED, LONGFORMER, PEGASUS_X, GPT_NEOX], ids=lambda workload: workload.name)
def test_published_configurations_build(workload):
    model = find_workload(workload.name).build(layers=1)
    assert sum(type(module).__name__ == workload.attention for module in model.modules()) == 1
    unknown = set(workload.published) - set(model.config.to_dict()) - {"rotary_pct", "rotary_emb_base"}
    assert not unknown
    inputs = workload.read(2, 100)
    assert inputs.kwargs["input_ids"].shape == (2, 100) and inputs.targets.shape[0] == 2


@pytest.mark.parametrize(
    ("case", "grids"),
    [
        (Case("led", "module", 300, 2, "float32", "cpu", 1, False), 6),
        (Case("led", "module", 300, 2, "float32", "cpu", 1, True), 6 + 4),
        (Case("led", "model", 300, 2, "float32", "cpu", 1, False), 6),
        (Case("led", "model", 300, 2, "float32", "cpu", 1, True), 6 + 4 * 6),
    ],
)
def test_memory_of_dense_scores_is_estimated(case, grids):
    """Plain operations hold six score tensors, and in training four of each layer."""
    assert dense_bytes(case) == grids * 2 * 12 * 300 * 300 * 4
    assert dense_bytes(replace(case, dtype="bfloat16")) == grids * 2 * 12 * 300 * 300 * 2


def test_longformer_reserves_two_positions():
    assert LONGFORMER.too_long(4096) is None
    assert "4096 positions" in str(LONGFORMER.too_long(4097))
    assert LONGFORMER.build(layers=1, seq_len=4097).config.max_position_embeddings == 4099


def test_subjects_are_equal_and_their_attention_is_far_from_uniform():
    first, second = build(CASE), build(CASE)
    for (name, a), (_, b) in zip(first.module.named_parameters(), second.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    largest_weights: list[float] = []

    def observe(site, attention, result, ran):
        weights = ran.run(attention, True).probabilities[0]
        largest_weights.append(float(weights.amax(-1).mean()))

    for site in first.patch("eager").sites:
        site.observer = observe
    first.forward()
    assert max(largest_weights) > 0.4  # uniform attention over a window of 9 has 0.11


def test_backward_reaches_inputs_and_parameters():
    subject = build(replace(CASE, scope="module"))
    subject.step()
    (states,) = subject.inputs
    assert states.grad is not None and float(states.grad.abs().max()) > 0
    assert all(parameter.grad is not None for parameter in subject.module.parameters())
    subject.clear()
    assert states.grad is None and all(parameter.grad is None for parameter in subject.module.parameters())


@pytest.mark.parametrize("backend", [None, "sdpa"])
def test_projections_are_those_of_the_module(backend):
    subject = build(replace(CASE, scope="attention"))
    if backend is not None:
        subject.patch(backend)
    projections = Projections(subject)
    assert len(projections._calls) == 6  # query, key, value, and the same three for global tokens
    projections.step()
    projections.clear()
    assert all(parameter.grad is None for parameter in subject.module.parameters())


@pytest.mark.parametrize("family", ["tiny", "reformer", "reformer_local"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward+backward"])
def test_states_get_gradients_in_training_and_in_its_projections(family, train):
    # Reversible layers run without gradients until their backward, so requires_grad does not show which inputs are
    # states.
    subject = build(Case(family, "attention", 512, 1, "float32", "cpu", 1, train))
    assert [states.ndim for states in subject.inputs] == ([3] if train else [])
    assert {x.requires_grad for _, _, x, _ in Projections(subject)._calls} == {train}
    subject.step()
    assert all((states.grad != 0).any() for states in subject.inputs)


@pytest.mark.parametrize("scope", ["module", "attention"])
def test_a_patched_first_layer_does_not_run_the_original_code_too(scope, monkeypatch):
    """The layers of LongT5 share a bias, which the first layer computes."""
    sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_heads=2, local_radius=3)
    tiny = replace(LONGT5_LOCAL, name="tiny_longt5", published={**LONGT5_LOCAL.published, **sizes}, heads=2)
    monkeypatch.setitem(WORKLOADS, "tiny_longt5", tiny)
    subject = build(replace(CASE, family="tiny_longt5", scope=scope, train=False))
    handle = subject.patch("sdpa")

    def forbidden(*args, **kwargs):
        raise AssertionError("the original forward ran")

    monkeypatch.setattr(type(subject.module), "forward", forbidden)
    subject.step()
    assert [site.calls for site in handle.sites] == [1]
