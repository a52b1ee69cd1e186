"""Fine-tune LED with transformers' Trainer, with the model's own attention and with a fused backend.

python examples/finetune_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from common import BOOK, arguments, measure, show_gain
from transformers import (
    AutoTokenizer,
    LEDForConditionalGeneration,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import attnzoo

TARGET = 64


def main() -> None:
    """Train twice from the same weights on the same batches, and compare losses and costs."""
    options = arguments(__doc__, "led", steps=6, batch=4, length=960, backend="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"]
    examples = []
    for start in range(0, options.steps * options.batch * options.length, options.length):
        text = tokens[start : start + options.length]
        source, target = text[:-TARGET], text[-TARGET:]
        global_mask = [1] + [0] * (len(source) - 1)
        examples.append({"input_ids": source, "labels": target, "global_attention_mask": global_mask})

    def train(backend: str, steps: int = options.steps) -> list[float]:
        model = LEDForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
        attnzoo.patch(model, backend)
        with tempfile.TemporaryDirectory() as folder:
            settings = Seq2SeqTrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=options.batch, seed=0,
                learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
                disable_tqdm=True,
            )  # fmt: skip
            trainer = Seq2SeqTrainer(model, settings, train_dataset=examples)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]

    train("native", steps=1)  # the first run loads libraries
    original, original_cost = measure(lambda: train("native"))  # native: the model's own code, counted
    patched, patched_cost = measure(lambda: train(options.backend))
    print("loss by step, original:", original)
    print(f"loss by step, {options.backend}:", patched)
    show_gain(original_cost, patched_cost, options.backend)


if __name__ == "__main__":
    main()
