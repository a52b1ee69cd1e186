"""Train the small checkpoints that tests load: one per family, byte-level, on the text of the benchmarks.

    python -m tests.checkpoints.train [family ...]

The model's own code trains each checkpoint until it clearly beats a unigram model, in a few minutes. The checkpoint is
saved in bfloat16 beside this file, with a card (``training.json``): bits per byte on held-out text, bits per byte of
the unigram model, steps and versions.
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
REST = HERE / "moby_dick_rest.txt"  # the chapters after those that are installed for the benchmarks
OFFSET, VOCAB = 3, 259  # tokens: 0 begin, 1 padding, 2 end; byte b is token b + 3
HELD_OUT = 50_000  # bytes at the end of the text for evaluation
LENGTH, TARGET = 256, 64


def tokens(train: bool) -> Tensor:
    """The bytes of the book as tokens: the training text, or the held-out end."""
    data = torch.frombuffer(bytearray(book() + REST.read_bytes()), dtype=torch.uint8).long() + OFFSET
    return data[:-HELD_OUT] if train else data[-HELD_OUT:]


def windows(batch: int, length: int, train: bool, generator: torch.Generator) -> Tensor:
    """``(batch, length)`` random windows of the text."""
    data = tokens(train)
    starts = torch.randint(0, len(data) - length, (batch,), generator=generator)
    return torch.stack([data[start : start + length] for start in starts.tolist()])


def causal(text: Tensor) -> dict[str, Any]:
    """Inputs to predict each token from the tokens before it."""
    return dict(input_ids=text, labels=text)


def continuation(text: Tensor) -> dict[str, Any]:
    """Inputs to predict the last tokens from all tokens before them."""
    return dict(input_ids=text[:, :-TARGET].contiguous(), labels=text[:, -TARGET:].contiguous())


def continuation_with_global(text: Tensor) -> dict[str, Any]:
    """Inputs of :func:`continuation`; the first token is global."""
    inputs = continuation(text)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, 0] = 1
    return inputs


@dataclass(frozen=True)
class Recipe:
    """How to train a family's checkpoint: its class, its configuration, and how text becomes its inputs."""

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
    "pegasus_x": Recipe(
        "PegasusXForConditionalGeneration",
        lambda: transformers.PegasusXConfig(
            d_model=80, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=320, decoder_ffn_dim=320, block_size=32, num_global_tokens=4, max_position_embeddings=1024,
            dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=2, **_special(),
        ),
        continuation,
    ),
    "bigbird_pegasus": Recipe(
        "BigBirdPegasusForConditionalGeneration",
        lambda: transformers.BigBirdPegasusConfig(
            d_model=80, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=320, decoder_ffn_dim=320, block_size=16, num_random_blocks=2, max_position_embeddings=1024,
            dropout=0.0, attention_dropout=0.0, decoder_start_token_id=2, **_special(),
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
    """Bits per held-out byte of a model that knows only the frequency of each byte."""
    counts = torch.bincount(tokens(True), minlength=VOCAB).double() + 1
    return float(-(counts / counts.sum()).log2()[tokens(False)].mean())


def train(name: str) -> None:
    """Train and save one checkpoint."""
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
