"""accelerate on patched models: training loops, models in several places, and weights that wait on CPU or disk."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from tests.support.judge import logits_of
from tests.support.models import FAMILIES, gpt_neox, ids, llama
from tests.support.programs import assert_runs_as_unpatched, updates_of, weights_of

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install attnzoo[tools]")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS, LENGTH = 3, 24
# {family: {class of the sites: kernels per forward}}. Longformer's attention runs a kernel for its global tokens too.
FORWARDS = {
    "led": {"LEDEncoderSelfAttention": 2, "LEDDecoderAttention": 1},
    "longformer": 2,
    "longt5-tglobal": 1,
    "gpt_neox": 1,
    "reformer": 1,
}


@pytest.mark.parametrize("first", ["patch", "prepare"])
@pytest.mark.parametrize("build", [gpt_neox, llama])
def test_a_training_loop_trains_as_without_a_patch(build, first):
    def program(model, patch):
        if first == "patch":
            patch(model)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        batches = torch.utils.data.DataLoader(ids(4 * STEPS, LENGTH), batch_size=2)
        before = weights_of(model)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        if first == "prepare":
            patch(accelerator.unwrap_model(model))
        losses = []
        for tokens in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        return {"losses": torch.stack(losses), "updates of weights": updates_of(model, before)}

    assert_runs_as_unpatched(build, program, calls=2 * STEPS)


def test_mixed_precision_trains_as_without_a_patch():
    """Under autocast, attention computes in bfloat16, so the comparison is with the unpatched run in bfloat16."""

    def train(model):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for step in range(STEPS):
            accelerator.backward(model(input_ids=ids(2, LENGTH, seed=step), labels=ids(2, LENGTH, seed=step)).loss)
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    start = weights_of(gpt_neox())
    expected = updates_of(train(gpt_neox()), start)
    model = gpt_neox()
    with attnzoo.patch(model, "sdpa") as handle:
        got = updates_of(train(model), start)
    assert {site.calls for site in handle.sites} == {STEPS}
    # bfloat16 has 8 bits, and a step follows the gradients of the steps before.
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def half_on_disk(model):
    """A device map that keeps every second block of layers on the disk, and everything else in memory."""
    blocks = [name for name, module in model.named_modules() if name.rpartition(".")[2].isdigit()]
    outer = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    places = {name: ("disk", "cpu")[number % 2] for number, name in enumerate(outer)}
    rest = [name for name in model.state_dict() if not any(name.startswith(f"{block}.") for block in outer)]
    return places | {name.rpartition(".")[0] or name: "cpu" for name in rest}  # a name without a module is a buffer


PLACES = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device="cpu"),
    "dispatched": lambda model, folder: accelerate.dispatch_model(
        model, half_on_disk(model), main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
}


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # buffers of LED are no modules
@pytest.mark.parametrize("first", ["patch", "place"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FORWARDS)
def test_offloaded_weights_compute_as_without_a_patch(family, place, first, tmp_path):
    """The weights of an offloaded module are on the meta device between two forwards."""
    family = FAMILIES[family]
    inputs = family.inputs(21, "right")

    def program(model, patch):
        if first == "patch":
            patch(model)
        PLACES[place](model, tmp_path / f"{next(model.parameters()).dtype}")
        if first == "place":
            patch(model)
        assert any(parameter.is_meta for parameter in model.parameters())
        with torch.no_grad():
            return {"logits": logits_of(model, inputs)}

    assert_runs_as_unpatched(
        family.build, program, FORWARDS[family.name], k=2, dtype=torch.float64 if family.coarse else torch.float32
    )
