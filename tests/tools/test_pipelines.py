"""transformers' pipelines with patched models: the same answers, and every attention on the backend."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import attnzoo
from tests.support.models import VOCAB, gpt_bigcode, gpt_neox, llama, longformer, reformer

TEXTS = ["w4 w5 w6 w7 w8", "w9 w10"]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per word: ``w3``, ``w4``, ..."""
    special = {"[BOS]": 0, "[PAD]": 1, "[EOS]": 2}
    words = special | {"[MASK]": 3} | {f"w{number}": number for number in range(4, VOCAB)}
    whole = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]", mask_token="[MASK]",
        unk_token="[PAD]", padding_side="left",
    )  # fmt: skip


def answers(run):
    """Run a pipeline. Return its answers and the kernels by backend."""
    before = Counter(attnzoo.stats())
    torch.manual_seed(0)
    return run(), Counter(attnzoo.stats()) - before


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [gpt_neox, gpt_bigcode, llama, reformer])
def test_text_generation(build, beams, tokenizer):
    model = build()

    def run():
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        options = dict(max_new_tokens=5, do_sample=False, num_beams=beams, return_full_text=False)
        return pipe(TEXTS, batch_size=2, **options)

    expected, calls = answers(run)
    assert not calls and len({answer[0]["generated_text"] for answer in expected}) == 2
    with attnzoo.patch(model, "sdpa") as handle:
        got, calls = answers(run)
    assert got == expected
    assert calls == {"sdpa": sum(site.calls for site in handle.sites)} and all(site.calls for site in handle.sites)


@pytest.mark.parametrize(
    ("task", "cls"),
    [("fill-mask", "LongformerForMaskedLM"), ("text-classification", "LongformerForSequenceClassification")],
)
def test_masked_tokens_and_classes(task, cls, tokenizer):
    model = longformer(cls)
    texts = [text + " [MASK]" for text in TEXTS]

    def run():
        pipe = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        return [answer for text in texts for answer in pipe(text, top_k=3)]

    expected, calls = answers(run)
    assert not calls
    with attnzoo.patch(model, "sdpa") as handle:
        got, calls = answers(run)
    assert calls == {"sdpa": sum(site.calls for site in handle.sites)} and all(site.calls for site in handle.sites)
    scores = [[answer.pop("score") for answer in given] for given in (expected, got)]
    assert got == expected and scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_an_installed_name_reaches_a_pipeline(tmp_path, tokenizer):
    """``model_kwargs`` of a pipeline name the backend, as in ``from_pretrained``."""
    gpt_neox().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = dict(task="text-generation", device="cpu")
    expected = pipeline(model=str(tmp_path), **options)(TEXTS, max_new_tokens=5, do_sample=False)
    with attnzoo.installed():
        pipe = pipeline(model=str(tmp_path), model_kwargs=dict(attn_implementation="attnzoo/sdpa"), **options)
        got, calls = answers(lambda: pipe(TEXTS, max_new_tokens=5, do_sample=False))
    assert got == expected
    assert calls == {"sdpa": sum(site.calls for site in attnzoo.handle(pipe.model).sites)}
