"""A backend of your own, checked by the conformance kit and used in a model.

    python examples/my_backend.py

docs/authors/backend.md explains each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from common import BOOK, arguments, measure, show_gain
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnzoo


@dataclass(frozen=True)
class RowsBackend(attnzoo.Backend):
    """Attention in blocks of queries: at most ``rows x kv_len`` scores exist at a time."""

    rows: int = 128

    name: ClassVar[str] = "rows"
    capabilities: ClassVar[attnzoo.Capabilities] = attnzoo.Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        patterns=frozenset({attnzoo.Full, attnzoo.Causal}),
        key_mask=True,
        grad=True,
    )

    def run(self, attention: attnzoo.Attention, probabilities: bool = False) -> attnzoo.Result:
        (segment,) = attention.segments
        keys = torch.arange(segment.kv_len)
        outputs, visible = [], []
        for block in torch.arange(attention.q_len).split(self.rows):
            scores = attention.query[:, :, block] @ segment.key.mT * attention.scale
            seen = segment.visible(block, keys, attention.q_len)
            if seen is None:
                seen = torch.ones((1, 1, len(block), segment.kv_len), dtype=torch.bool)
            weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
            outputs.append(weights @ segment.value)
            visible.append(seen.any(-1).expand(attention.batch, attention.heads, -1))
        return attnzoo.Result(attention.fill(torch.cat(outputs, 2), torch.cat(visible, 2)), kernel="rows")


def main() -> None:
    """Check the backend, then compare it with the dense definition in a model."""
    options = arguments(__doc__, "gpt_neox", length=1536)
    attnzoo.register_backend(RowsBackend)
    print(attnzoo.testing.check_backend("rows"))

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = torch.tensor(tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"])[None, : options.length]

    @torch.no_grad()
    def forward() -> None:
        model(tokens, use_cache=False)

    forward()  # the first run loads libraries
    with attnzoo.patch(model, "eager"):
        _, dense_cost = measure(forward)
    with attnzoo.patch(model, "rows", rows=64) as handle:
        _, rows_cost = measure(forward)
    print(handle)
    print("`original` is the backend eager here, which stores all scores:")
    show_gain(dense_cost, rows_cost, "rows")


if __name__ == "__main__":
    main()
