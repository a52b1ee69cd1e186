"""Fine-tune LongT5 with LoRA (PEFT), with the model's own attention and with a fused backend.

python examples/finetune_lora.py
"""

from __future__ import annotations

import torch
from common import BOOK, arguments, measure, show_gain
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LongT5ForConditionalGeneration

import attnzoo

TARGET = 64


def main() -> None:
    """Train the same adapter twice, and compare losses and costs."""
    options = arguments(__doc__, "longt5", steps=4, length=2048, backend="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = torch.tensor(tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"])
    texts = tokens[: options.steps * options.length].view(options.steps, 1, options.length)

    def train(backend: str, texts: torch.Tensor = texts) -> list[float]:
        torch.manual_seed(0)
        base = LongT5ForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")).train()
        handle = attnzoo.patch(model, backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for text in texts:
            loss = model(input_ids=text[:, :-TARGET], labels=text[:, -TARGET:].contiguous()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
        handle.remove()
        model.merge_and_unload()  # a plain LongT5 again
        return losses

    train("native", texts[:1])  # the first run loads libraries
    original, original_cost = measure(lambda: train("native"))  # native: the model's own code, counted
    patched, patched_cost = measure(lambda: train(options.backend))
    print("loss by step, original:", original)
    print(f"loss by step, {options.backend}:", patched)
    show_gain(original_cost, patched_cost, options.backend)


if __name__ == "__main__":
    main()
