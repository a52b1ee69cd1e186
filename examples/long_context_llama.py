"""Give a dense model such as Llama a window and attention sinks, and print what this gains and what it costs.

    python examples/long_context_llama.py
    python examples/long_context_llama.py --model meta-llama/Llama-3.2-1B --length 8192

The shipped model is a small trained GPT-NeoX. Every dense decoder model of transformers takes the same call.
"""

from __future__ import annotations

import torch
from common import BOOK, arguments, measure, show_gain
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnzoo


def main() -> None:
    """Compare perplexity and recall for several windows, then the cost of one forward over a long text."""
    options = arguments(__doc__, "gpt_neox", short=256, length=8192, window=128, sinks=4)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = torch.tensor(tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"])
    texts = tokens[: 8 * options.short].view(8, options.short)

    @torch.no_grad()
    def perplexity() -> float:
        return model(texts, labels=texts, use_cache=False).loss.exp().item()

    dense = perplexity()
    print(f"quality on 8 texts of {options.short} tokens; perplexity of the dense model: {dense:.2f} per token")
    for window in (options.short // 16, options.short // 8, options.short // 4, options.short // 2):
        with attnzoo.patch(model, "blocked-local", window=window, sinks=options.sinks):
            windowed = perplexity()
        report = attnzoo.verify(
            model, {"input_ids": texts[:1]}, "blocked-local", window=window, sinks=options.sinks, fast=True
        )
        recall = sum(site.recall or 0.0 for site in report.sites) / len(report.sites)
        print(f"  window {window:4}: perplexity {windowed:.2f} ({windowed / dense:.3f}x), recall {recall:.3f}")

    long_text = tokens[: options.length][None]

    @torch.no_grad()
    def forward() -> None:
        model.base_model(long_text, use_cache=False)  # without the logits, which would need most of the memory

    print(f"one forward over {options.length} tokens, window {options.window}, {options.sinks} sinks:")
    _, original_cost = measure(forward)
    with attnzoo.patch(model, "blocked-local", window=options.window, sinks=options.sinks):
        _, patched_cost = measure(forward)
    show_gain(original_cost, patched_cost, "blocked-local")


if __name__ == "__main__":
    main()
