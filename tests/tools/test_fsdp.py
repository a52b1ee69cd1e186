"""FSDP2 (``fully_shard``) on patched models, in two processes: each keeps half of every weight between two forwards."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.models import gpt_neox, ids, led, llama
from tests.support.processes import COUNT
from tests.support.programs import assert_runs_as_unpatched

STEPS = 2
BUILDS = {"gpt_neox": gpt_neox, "llama": llama, "led": led}


def shard(model):
    """Shard each layer, and then what is left, as users do."""
    mesh = init_device_mesh("cpu", (COUNT,))
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit():
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def whole(model):
    return torch.cat([weight.full_tensor().detach().double().flatten() for weight in model.parameters()])


def train(rank, name, first):
    def program(model, patch):
        if first == "patch":
            patch(model)
        shard(model.train())
        if first == "shard":
            patch(model)
        before, losses = whole(model), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(STEPS):
            tokens = ids(2, 24, seed=COUNT * step + rank)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), "updates of weights": whole(model) - before}

    assert_runs_as_unpatched(BUILDS[name], program, calls=STEPS)


@pytest.mark.parametrize("first", ["patch", "shard"])
@pytest.mark.parametrize("name", BUILDS)
def test_fsdp_trains_as_without_a_patch(name, first, in_two_processes):
    in_two_processes(train, name, first)
