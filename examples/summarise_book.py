"""Summarise a book with LED, part by part, with the model's own attention and with a fused backend.

    python examples/summarise_book.py
    python examples/summarise_book.py --model allenai/led-large-16384-arxiv --book my_book.txt --parts 0

The shipped model only continues text. A checkpoint that was trained to summarise gives summaries.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import BOOK, arguments, measure, show_gain
from transformers import AutoTokenizer, LEDForConditionalGeneration

import attnzoo


def main() -> None:
    """Summarise the book twice, and compare the texts and the costs."""
    options = arguments(__doc__, "led", book=str(BOOK), parts=6, tokens=24, backend="sdpa")
    model = LEDForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = torch.tensor(tokenizer(Path(options.book).read_text(encoding="utf-8"))["input_ids"])
    parts = list(tokens.split(model.config.max_encoder_position_embeddings))
    parts = parts[: options.parts] if options.parts else parts
    print(f"{len(tokens)} tokens; {len(parts)} parts of up to {len(parts[0])} tokens are summarised")

    def summarise(parts: list[torch.Tensor]) -> list[str]:
        summaries = []
        for part in parts:
            input_ids = part[None]
            global_attention_mask = torch.zeros_like(input_ids)
            global_attention_mask[:, 0] = 1  # the first token sees every token, and every token sees it
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                global_attention_mask=global_attention_mask,
                max_new_tokens=options.tokens,
                do_sample=False,
            )
            summaries.append(tokenizer.decode(output[0], skip_special_tokens=True))
        return summaries

    summarise(parts[:1])  # the first run loads libraries
    original, original_cost = measure(lambda: summarise(parts))
    # Decoding one token at a time gains nothing, so only the encoder is patched.
    with attnzoo.patch(model, {"*encoder.layers*": options.backend}) as handle:
        patched, patched_cost = measure(lambda: summarise(parts))
    print(handle)
    print(f"first summary: {patched[0]!r}")
    print(f"{sum(a == b for a, b in zip(original, patched, strict=True))} of {len(parts)} summaries are the same text")
    show_gain(original_cost, patched_cost, options.backend)


if __name__ == "__main__":
    main()
