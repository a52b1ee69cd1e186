"""Train the small checkpoints that tests load: one per family, byte-level, on the text of the shootout.

    python -m tests.checkpoints.train [family ...]

Each is trained with the model's own code until it clearly beats a unigram model, and saved in bfloat16 beside this file
with a card (``training.json``): bits per byte on held-out text, the unigram's, steps, versions. A few minutes each.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from attnzoo.benchmarks.text import book

HERE = Path(__file__).parent
REST = HERE / "moby_dick_rest.txt"  # what follows the chapters that are installed for the shootout
OFFSET, VOCAB = 3, 259  # 0 begins, 1 pads, 2 ends; byte b is token b + 3
HELD_OUT = 50_000  # the last bytes of the text are for judging
LENGTH, TARGET = 256, 64


def tokens(train: bool) -> Tensor:
    """The book's bytes as tokens: all but the held-out end, or that end."""
    data = torch.frombuffer(bytearray(book() + REST.read_bytes()), dtype=torch.uint8).long() + OFFSET
    return data[:-HELD_OUT] if train else data[-HELD_OUT:]


def windows(batch: int, length: int, train: bool, generator: torch.Generator) -> Tensor:
    """``(batch, length)`` random windows of the text."""
    data = tokens(train)
    starts = torch.randint(0, len(data) - length, (batch,), generator=generator)
    return torch.stack([data[start : start + length] for start in starts.tolist()])


def causal(text: Tensor) -> dict[str, Any]:
    """Every token from those before it."""
    return dict(input_ids=text, labels=text)


def continuation(text: Tensor) -> dict[str, Any]:
    """The last tokens from all before them."""
    return dict(input_ids=text[:, :-TARGET].contiguous(), labels=text[:, -TARGET:].contiguous())


def continuation_with_global(text: Tensor) -> dict[str, Any]:
    """The same with the first token global."""
    inputs = continuation(text)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, 0] = 1
    return inputs


@dataclass(frozen=True)
class Recipe:
    """How a family's checkpoint is made: its class, its configuration, and how text becomes its inputs."""

    cls: str
    config: Callable[[], Any]
    inputs: Callable[[Tensor], dict[str, Any]]
    steps: int = 1200
    rate: float = 2e-3


def _special(**changes: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCAB, bos_token_id=0, pad_token_id=1, eos_token_id=2, **changes)


RECIPES = {
    "gpt_neox": Recipe(
        "GPTNeoXForCausalLM",
        lambda: transformers.GPTNeoXConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
            max_position_embeddings=1024, **_special(),
        ),
        causal,
    ),
    "gpt_bigcode": Recipe(
        "GPTBigCodeForCausalLM",
        lambda: transformers.GPTBigCodeConfig(
            n_embd=96, n_layer=4, n_head=4, n_positions=1024, multi_query=True, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0, **_special(),
        ),
        causal,
    ),
    "led": Recipe(
        "LEDForConditionalGeneration",
        lambda: transformers.LEDConfig(
            d_model=80, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=320, decoder_ffn_dim=320, attention_window=32, max_encoder_position_embeddings=1024,
            max_decoder_position_embeddings=256, dropout=0.0, decoder_start_token_id=2, **_special(),
        ),
        continuation_with_global,
    ),
    "longt5": Recipe(
        "LongT5ForConditionalGeneration",
        lambda: transformers.LongT5Config(
            d_model=80, d_kv=20, d_ff=320, num_layers=2, num_decoder_layers=2, num_heads=4, local_radius=15,
            global_block_size=8, encoder_attention_type="transient-global", dropout_rate=0.0,
            decoder_start_token_id=1, **_special(),
        ),
        continuation,
    ),
    "reformer": Recipe(
        "ReformerModelWithLMHead",
        lambda: transformers.ReformerConfig(
            hidden_size=96, num_attention_heads=4, attention_head_size=24, feed_forward_size=384,
            attn_layers=["local", "lsh", "local", "lsh"], is_decoder=True, num_hashes=2, num_buckets=16,
            lsh_attn_chunk_length=32, local_attn_chunk_length=32, axial_pos_embds=False, max_position_embeddings=1024,
            hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
            hash_seed=7, tie_word_embeddings=False, **_special(),
        ),
        causal,
        steps=900,
    ),
}  # fmt: skip


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, recipe: Recipe, batches: int = 4) -> float:
    """Mean loss on held-out text, in bits per byte."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    losses = [model(**recipe.inputs(windows(8, LENGTH, False, generator))).loss for _ in range(batches)]
    return float(torch.stack(losses).float().mean()) / math.log(2)


def unigram_bits() -> float:
    """What a model that knows only how often each byte occurs needs per held-out byte."""
    counts = torch.bincount(tokens(True), minlength=VOCAB).double() + 1
    return float(-(counts / counts.sum()).log2()[tokens(False)].mean())


def train(name: str) -> None:
    """Make one checkpoint."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = getattr(transformers, recipe.cls)(recipe.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(recipe.steps):
        loss = model(**recipe.inputs(windows(8, LENGTH, True, generator))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{name}: step {step}, {loss.item() / math.log(2):.3f} bits per byte", flush=True)
    model = model.to(torch.bfloat16)
    folder = HERE / name
    model.save_pretrained(folder)
    card = dict(
        bits_per_byte=round(bits_per_byte(model.float(), recipe), 4),
        unigram_bits_per_byte=round(unigram_bits(), 4),
        steps=recipe.steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(name, card, flush=True)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or RECIPES:
        train(chosen)
