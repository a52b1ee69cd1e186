"""Find out which backends and kernels ran in a model that `install` patched."""

from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
import transformers

import attnzoo
from tests.support.checkpoints import passage

FAMILIES = ("led", "longt5", "pegasus_x", "bigbird_pegasus", "reformer", "gpt_neox", "gpt_bigcode")


inputs_of = cache(partial(passage, length=96, padded=True))  # tests do not change the inputs


@torch.no_grad()
def logits(family, model):
    torch.manual_seed(0)  # Reformer draws its hash functions
    return model(**inputs_of(family)).logits


def backends_of(model):
    """The requested backends of all sites, or an empty set if the model is not patched."""
    return {site.backend for site in attnzoo.handle(model).sites} if attnzoo.is_patched(model) else set()


def ran(family, model):
    """Run one forward; return the kernels that ran at the sites during the forward. Every site must run."""
    sites = attnzoo.handle(model).sites
    before = [site.kernels.copy() for site in sites]
    logits(family, model)
    kernels = [site.kernels - count for site, count in zip(sites, before, strict=True)]
    assert all(kernels), "a site did not run"
    return set().union(*kernels)


@contextmanager
def no_weights_loaded():
    """Fail if `from_pretrained` loads weights in the block."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformers.PreTrainedModel, "_load_pretrained_model", fail)
        yield
