"""Every way to run dropout drops softmax weights at the given rate and scales the others."""

import pytest
import torch

from attnzoo import testing
from attnzoo.backends.eager import EagerBackend
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.functional import execute
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Causal, Full, SortedChunks, Window
from attnzoo.testing import AttentionCase
from tests.support.half import HALF

WAYS = {
    "eager": (EagerBackend(), dict(pattern=Window(5, 3), mask="globals"), "eager"),
    "one call": (SdpaBackend(), dict(pattern=Full(), mask="keys"), "math"),
    "one causal call": (SdpaBackend(), dict(pattern=Causal()), "math"),
    "blocks": (SdpaBackend(), dict(pattern=Window(5, 3), mask="globals", kv_heads=2), "math"),
    "a bias": (SdpaBackend(), dict(pattern=Causal(), bias="relative"), "math"),
    "sorted queries": (SdpaBackend(), dict(pattern=SortedChunks(5, 1, 1)), "math_blocks"),
    "sorted queries in half": (SdpaBackend(), dict(pattern=SortedChunks(5, 1, 0, True), dtype=HALF), "math_blocks"),
    "hashed keys": (SdpaBackend(), dict(pattern=HashedChunks(5), mask="keys"), "math_blocks"),
    "one packed call": (FlashBackend(), dict(pattern=Causal(), dtype=HALF), "flash_attn"),
    "a packed union": (FlashBackend(), dict(pattern=Window(5, 3), mask="globals", dtype=HALF), "flash_attn"),
}


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_dropped_at_the_rate_and_scaled(flash_attn, way, rate):
    backend, terms, kernel = WAYS[way]
    case = AttentionCase(**terms, dropout=rate)
    assert not testing.run_case(backend, case).failure
    assert execute(backend, case.attention()).kernel == kernel


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_with_one_seed_drop_the_same_weights(flash_attn, way):
    backend, terms, _ = WAYS[way]
    whole = AttentionCase(**terms, dropout=0.5).attention()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(execute(backend, whole).output)
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[1:])
