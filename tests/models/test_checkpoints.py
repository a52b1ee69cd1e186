"""Trained weights, one small checkpoint per family: perplexity means something, and so does fine-tuning."""

import json
import math

import pytest
import torch
import transformers

import attnzoo
from attnzoo.error_rule import FORWARD, GRADIENT, check

from ..checkpoints.train import HERE, LENGTH, RECIPES, unigram_bits, windows

families = pytest.mark.parametrize("family", RECIPES)
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def load(family, dtype=torch.float32):
    return getattr(transformers, RECIPES[family].cls).from_pretrained(HERE / family, dtype=dtype).eval()


def held_out(family, batch=4):
    text = windows(batch, LENGTH, False, torch.Generator().manual_seed(5))
    return RECIPES[family].inputs(text)


@torch.no_grad()
def bits(model, inputs):
    return model(**inputs).loss.item() / math.log(2)


@families
def test_the_checkpoint_clearly_beats_a_unigram_model(family):
    card = json.loads((HERE / family / "training.json").read_text())
    found = bits(load(family), held_out(family, batch=8))
    assert found < unigram_bits() - 0.5
    assert found == pytest.approx(card["bits_per_byte"], abs=0.3)


@families
@backends
def test_perplexity_is_the_originals_to_four_digits(family, backend):
    model, inputs = load(family), held_out(family)
    original = 2 ** bits(model, inputs)
    with attnzoo.patch(model, backend) as handle:
        patched = 2 ** bits(model, inputs)
    assert all(site.calls for site in handle.sites)
    assert f"{patched:.4g}" == f"{original:.4g}" or patched == pytest.approx(original, rel=1e-5)


def fine_tune(family, backend, dtype=torch.float32, steps=30):
    """Losses and final parameters of plain SGD on the text."""
    model = load(family, dtype).train()
    handle = attnzoo.patch(model, backend) if backend else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator, losses = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        loss = model(**RECIPES[family].inputs(windows(2, LENGTH, True, generator))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert handle is None or all(site.calls >= steps for site in handle.sites)
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@families
def test_thirty_steps_of_fine_tuning_are_the_originals(family):
    # Reformer draws its hash rotations in the dtype of the model: in float64 it would hash otherwise, so that there the
    # original itself is what to equal.
    hashes = family == "reformer"
    original, eager, fused = fine_tune(family, None), fine_tune(family, "eager"), fine_tune(family, "sdpa")
    reference = [part.double() for part in original] if hashes else fine_tune(family, "eager", torch.float64)
    for what, k, index in (("losses", FORWARD, 0), ("parameters", GRADIENT, 1)):
        for run in (fused, original):
            verdict = check(what, run[index], reference[index], eager[index], k)
            assert verdict.ok, str(verdict)
    start = torch.cat([parameter.detach().flatten() for parameter in load(family).parameters()])
    moved = (original[1] - start).abs().max()
    assert moved > 1e-3, "and it is training"
    if not hashes:  # a rounding can move a token to another bucket, and from there two runs part ways
        assert moved > 100 * (fused[1] - original[1]).abs().max(), "training moves them far more than they differ"
