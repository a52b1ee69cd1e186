"""transformers' tensor-parallel plans with a patch, in two processes: each computes half of the heads."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import attnzoo
from tests.support.models import gpt_neox, ids, llama

# The vocabulary is even, because old releases of transformers split the last layer into equal halves only.
BUILDS = {name: partial(build, vocab_size=100) for name, build in (("llama", llama), ("gpt_neox", gpt_neox))}


def generate(rank, name, path):
    model = BUILDS[name]()
    cls, inputs = type(model), dict(input_ids=ids(2, 17))
    with torch.no_grad():
        whole = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        half = cls.from_pretrained(path, tp_plan="auto").eval()
        original = half(**inputs).logits
        with attnzoo.patch(half, "sdpa") as handle:
            heads = []
            for site in handle.sites:
                site.observer = lambda site, attention, result, backend: heads.append(attention.query.shape[1])
            patched = half(**inputs).logits
            assert {site.calls for site in handle.sites} == {1}
            assert set(heads) == {model.config.num_attention_heads // 2}
            torch.testing.assert_close(patched, original, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(patched, whole, rtol=1e-4, atol=1e-4)
            assert torch.equal(half.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("name", BUILDS)
def test_a_plan_computes_as_without_a_patch(name, tmp_path, in_two_processes):
    BUILDS[name]().save_pretrained(tmp_path)
    in_two_processes(generate, name, str(tmp_path))
