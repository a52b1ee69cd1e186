"""Make the plan of a shootout from the options of ``attnzoo bench``."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.benchmarks.runner import ShootoutPlan
from attnzoo.spelling import dtype_name

DEFAULT_LENGTHS = (1024, 2048, 4096)
HOST_LENGTHS = {"overhead": (64, 1024, 4096), "decode": (64, 1024)}
FULL_LENGTHS = (1024, 2048, 4096, 8192, 16384)


def make_plan(
    models: list[str] | None = None,
    backends: list[str] | None = None,
    seq_lens: list[int] | None = None,
    *,
    dtype: str = "float32",
    threads: int | None = None,
    train: bool | None = None,
    full: bool = False,
    **fields: Any,
) -> ShootoutPlan:
    """Return the plan for options of the command. ``fields`` are further fields of :class:`ShootoutPlan`."""
    if full:
        fields.update(seconds_per_case=60.0, dense_limit=None)
    elif not (backends or seq_lens or train) and fields.get("scope", "model") == "model":
        fields.update(train_limit=2048)  # keeps a run without options short
    scope = fields.get("scope", "model")
    if train is None and scope in HOST_LENGTHS:
        train = False
    lengths = FULL_LENGTHS if full else HOST_LENGTHS.get(scope, DEFAULT_LENGTHS)
    plan = ShootoutPlan(
        families=tuple(dict.fromkeys(models or ["led"])),
        backends=tuple(backends) if backends else None,
        seq_lens=tuple(sorted(set(seq_lens or lengths))),
        modes=(False, True) if train is None else (train,),
        dtype=dtype_name(dtype),
        threads=torch.get_num_threads() if threads is None else threads,
        **fields,
    )
    plan.contenders()  # raises for a wrong backend before the measurements start
    return plan
