"""DistributedDataParallel around patched models, in two processes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import gpt_neox, ids, led, llama, longt5
from tests.support.processes import COUNT
from tests.support.programs import assert_runs_as_unpatched, updates_of, weights_of

STEPS = 2
# Without global tokens, LED's encoder does not use the projections for them.
BUILDS = {"gpt_neox": gpt_neox, "llama": llama, "led": led, "longt5": longt5}


def batch(name, step, rank):
    """Each process trains on other texts."""
    tokens = ids(2, 24, seed=COUNT * step + rank)
    labels = ids(2, 6, seed=COUNT * step + rank + 9) if name in ("led", "longt5") else tokens
    return dict(input_ids=tokens, labels=labels)


def train(rank, name):
    def program(model, patch):
        patch(model)
        before = weights_of(model)
        parallel = DistributedDataParallel(model.train(), find_unused_parameters=name == "led")
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02)
        losses = []
        for step in range(STEPS):
            loss = parallel(**batch(name, step, rank)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        updates = updates_of(model, before)
        other = updates.clone()
        torch.distributed.broadcast(other, src=0)
        assert torch.equal(updates, other), "the processes have different weights"
        return {"losses": torch.stack(losses), "updates of weights": updates}

    assert_runs_as_unpatched(BUILDS[name], program, calls=STEPS)


@pytest.mark.parametrize("name", BUILDS)
def test_ddp_trains_as_without_a_patch(name, in_two_processes):
    in_two_processes(train, name)
