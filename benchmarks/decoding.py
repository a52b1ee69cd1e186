"""Greedy decoding of a whole model, with the CPU time of each token."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.benchmarks.rows import SKIPPED, Problem

# Tokens of a timed run, and of a run that the gate observes. The gate compares every attention with the oracle.
TIMED_TOKENS, GATE_TOKENS = 16, 4
# Arguments of a forward that ``generate`` chooses itself.
_CHOSEN = ("use_cache", "decoder_input_ids")


class Decoding:
    """Greedy decoding with a dynamic cache.

    Args:
        model: a model of transformers that generates text.
        inputs: the arguments of a forward. They contain the prompt.

    Raises:
        Problem: the model generates no text.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        can_generate = getattr(model, "can_generate", lambda: False)
        if not can_generate():
            raise Problem(SKIPPED, f"{type(model).__name__} generates no text")
        self._model: Any = model
        self._prompt = {name: value for name, value in inputs.items() if name not in _CHOSEN}

    def tokens(self, count: int) -> Tensor:
        """Decode ``count`` tokens and return the sequences, ``(batch, length)``."""
        return self._run(count)[0]

    def cpu_seconds_per_token(self) -> float:
        """Return the median CPU seconds of a token after the first, which includes the prompt.

        CPU time counts all threads of the process, and not the time in which other programs run.
        """
        times = self._run(TIMED_TOKENS)[1]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))

    def _run(self, count: int) -> tuple[Tensor, list[float]]:
        """Decode ``count`` tokens. Return the sequences, and the CPU time of the process after each token."""
        times: list[float] = []

        def note(sequences: Tensor, scores: Any, **more: Any) -> Tensor:
            times.append(time.process_time())
            return torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)

        from transformers import StoppingCriteriaList

        criteria = StoppingCriteriaList()
        criteria.append(note)
        with contextlib.redirect_stdout(io.StringIO()):  # Reformer prints warnings about arguments of ``generate``
            sequences: Tensor = self._model.generate(
                **self._prompt,
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                stopping_criteria=criteria,
            )
        return sequences, times
