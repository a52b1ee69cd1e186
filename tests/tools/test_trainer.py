"""transformers' Trainer and Seq2SeqTrainer on patched models: losses, weights and predictions of the unpatched run."""

from __future__ import annotations

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from tests.support.models import gpt_neox, ids, led, llama, longt5
from tests.support.programs import assert_runs_as_unpatched, updates_of, weights_of

pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install attnzoo[tools]")
LENGTH, STEPS = 24, 3
# Plain gradient descent: Adam divides each gradient by its size, and so makes rounding errors as large as the steps.
OPTIONS = dict(
    max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.05, optim="sgd", logging_steps=1, report_to=[],
    save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, lr_scheduler_type="constant", max_grad_norm=1.0,
)  # fmt: skip


def documents(count=8, length=LENGTH):
    """Texts of two lengths, padded on the right."""
    tokens, mask = ids(count, length), torch.ones(count, length, dtype=torch.long)
    mask[1::2, length - 5 :] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    columns = dict(input_ids=tokens, attention_mask=mask, labels=labels)
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]


def sources(count=8):
    """Texts with summaries."""
    summaries = ids(count, 6, seed=9)
    return [{**document, "labels": summaries[row]} for row, document in enumerate(documents(count))]


def trained(model, trainer):
    before = weights_of(model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return {"losses": torch.tensor(losses, dtype=torch.float64), "updates of weights": updates_of(model, before)}


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, STEPS),
        (dict(gradient_accumulation_steps=2), 2 * STEPS),
        (dict(gradient_checkpointing=True), 2 * STEPS),
    ],
    ids=["plain", "accumulation", "checkpointing"],
)
@pytest.mark.parametrize("build", [gpt_neox, llama])
def test_trainer_trains_as_without_a_patch(build, changes, calls, tmp_path):
    def program(model, patch):
        patch(model)
        arguments = TrainingArguments(str(tmp_path), **OPTIONS, **changes)
        return trained(model, Trainer(model, arguments, train_dataset=documents()))

    assert_runs_as_unpatched(build, program, calls)


def test_trainer_evaluates_saves_and_resumes(tmp_path):
    """A checkpoint of a patched model has the keys of the model, and a patched model resumes from it."""

    def program(model, patch):
        patch(model)
        arguments = TrainingArguments(str(tmp_path), **{**OPTIONS, "save_strategy": "steps"}, save_steps=1)
        trainer = Trainer(model, arguments, train_dataset=documents(), eval_dataset=documents(4))
        trainer.train()
        whole, loss = weights_of(model), trainer.evaluate()["eval_loss"]
        trainer = Trainer(model, arguments, train_dataset=documents())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert updates_of(model, whole).abs().max() < 1e-6, "the resumed run ends where the whole run ended"
        real = torch.stack([document["attention_mask"] for document in documents(2)]).bool()
        logits = torch.tensor(trainer.predict(documents(2)).predictions)[real]
        return {"loss": torch.tensor(loss), "logits": logits}

    assert_runs_as_unpatched(llama, program, calls=STEPS + 1 + (STEPS - 1) + 1)


_ENCODER, _DECODER = STEPS + 2, STEPS + 1 + 4  # steps, the loss of the predictions, and their generation
SEQ2SEQ = {
    led: {"LEDEncoderSelfAttention": _ENCODER, "LEDDecoderAttention": _DECODER},
    longt5: {"LongT5LocalAttention": _ENCODER, "LongT5Attention": _DECODER},
}


@pytest.mark.parametrize("build", SEQ2SEQ)
def test_seq2seq_trainer_trains_and_generates_as_without_a_patch(build, tmp_path):
    def program(model, patch):
        patch(model)
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), **OPTIONS, predict_with_generate=True, generation_max_length=5
        )
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=sources())
        results = trained(model, trainer)
        tokens = trainer.predict(sources(4)).predictions
        return {**results, "tokens": torch.tensor(tokens)}

    assert_runs_as_unpatched(build, program, SEQ2SEQ[build])
