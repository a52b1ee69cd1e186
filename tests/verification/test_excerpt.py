"""``verify(fast=True)`` reads the beginning of one sample."""

import pytest
import torch

import attnzoo
from attnzoo.verification.excerpt import excerpt, remark
from tests.support.checkpoints import load, passage
from tests.support.models import FAMILIES, gpt_neox, led, led_inputs
from tests.verification.planted_faults import FAULTS

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_excerpt_keeps_the_first_real_tokens_of_the_longest_sample():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    ids = torch.arange(18).reshape(3, 6)
    cut = excerpt(dict(input_ids=ids, attention_mask=mask, inputs_embeds=ids[..., None].float(), use_cache=False), 3)
    assert cut["input_ids"].tolist() == [[7, 8, 9]] and cut["attention_mask"].tolist() == [[1, 1, 1]]
    assert cut["inputs_embeds"].flatten().tolist() == [7.0, 8.0, 9.0] and cut["use_cache"] is False


def test_excerpt_cuts_decoder_inputs_by_the_decoder_mask():
    inputs = led_inputs(37, "left")
    inputs["labels"] = inputs["decoder_input_ids"]
    cut = excerpt(inputs, 4)
    assert all(tensor.shape == (1, 4) for tensor in cut.values())
    assert cut["decoder_attention_mask"].all() and cut["attention_mask"].all()
    assert torch.equal(cut["labels"], cut["decoder_input_ids"])


MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (dict(input_ids=MASK[:1]), ""),
        (dict(input_ids=MASK), "checked: all 6 tokens of sample 1 of 2"),
        (dict(input_ids=MASK[:1].repeat(1, 2)), "checked: the first 6 of 12 tokens"),
        (dict(inputs_embeds=torch.ones(2, 9, 4)), "checked: the first 6 of 9 tokens of sample 1 of 2"),
        (dict(input_ids=MASK, attention_mask=MASK), "checked: all 5 tokens of sample 2 of 2"),
        (
            dict(input_ids=MASK.repeat(1, 2), attention_mask=MASK.repeat(1, 2).flip(0)),
            "checked: the first 5 of 10 tokens of sample 1 of 2",
        ),
        (
            dict(input_ids=MASK[:1], decoder_input_ids=MASK[:1].repeat(1, 2)),
            "checked: all 6 tokens and the first 6 of 12 decoder tokens",
        ),
    ],
    ids=["nothing is cut", "a sample", "tokens", "both", "padding", "more padding", "decoder"],
)
def test_remark_names_the_tokens_that_are_checked(inputs, text):
    assert remark(inputs, 6) == text


def test_fast_report_says_what_was_cut_and_what_was_not_compared():
    def report(*shape):
        inputs = {"input_ids": torch.ones(shape, dtype=torch.long)}
        return attnzoo.verify(gpt_neox(), inputs, fast=True, gradients=False, max_rows=4)

    cut = report(2, 270)
    assert cut.note == "checked: the first 256 of 270 tokens of sample 1 of 2"
    assert cut.note in str(cut) and "; -: not compared\n" in str(cut).replace("\n  ", " ")
    assert report(1, 9).note == ""


@pytest.mark.parametrize("value", [torch.ones(1, 1, 5, 5), torch.ones(5), object(), [[1, 2]]])
def test_input_that_cannot_be_cut_is_refused_by_name(value):
    inputs = dict(input_ids=torch.ones(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 5))
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"inputs\['other'\]: got .*; allowed: with fast=True"):
        attnzoo.verify(gpt_neox(), {**inputs, "other": value}, fast=True)


@families
def test_fast_verify_passes_every_family(family):
    steps = []
    report = attnzoo.verify(
        family.build(), family.inputs(40, "left"), fast=True, progress=lambda done, what: steps.append((done, what))
    )
    assert report.ok, str(report)
    assert "end-to-end gradients" in report.note and not any("gradient" in check.what for check in report.end_to_end)
    shares = [done for done, _ in steps]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert attnzoo.verify(family.build(), family.inputs(40, "left"), "native", fast=True).ok


def test_fast_verify_detects_faults_in_gradients_alone():
    for fault in FAULTS:
        if fault.gradient_only:
            report = attnzoo.verify(load(fault.family), passage(fault.family), fault.backend(), fast=True)
            assert not report.ok, fault.what


def test_fast_verify_without_gradients_compares_outputs_only():
    report = attnzoo.verify(led(), led_inputs(26, "none"), fast=True, gradients=False)
    assert report.ok and {check.what for site in report.sites for check in site.checks} == {"output"}


def test_remark_says_that_padding_was_left_out():
    """Otherwise an adapter that loses the padding mask would seem to be checked."""
    ids, mask = torch.ones(1, 5, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask}
    assert remark(given, 6) == "checked: all 3 tokens, without padding"
    assert remark({**given, "attention_mask": mask.flip(1)}, 6) == "", "padding on the right is kept"
