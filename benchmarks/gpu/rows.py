"""Run a shootout in this process, case by case."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.benchmarks.gpu.results import Keep, Results
from attnzoo.benchmarks.gpu.settings import Settings, load_models
from attnzoo.benchmarks.rows import Shootout
from attnzoo.benchmarks.runner import ShootoutPlan, run
from attnzoo.benchmarks.worker import Worker


def rows(settings: Settings, keep: Keep, **fields: Any) -> None:
    """Run a shootout, and keep its rows after each case.

    All contenders run in this process, unlike in ``attnzoo bench``. On a GPU, a process for each contender would take
    most of the time, and the peak memory is measured right in one process, too. The gates of the rows stay; only the
    end-to-end gates are left to the item ``models``.
    """

    def keep_case(so_far: Shootout) -> None:
        keep(Results(shootouts=(so_far,)))
        if settings.device == "cuda":
            torch.cuda.synchronize()  # raises after a fault of a kernel, because all later rows would fail, too

    plan = ShootoutPlan(**settings.plan(**fields))
    load_models(plan.families)
    run(plan, launch=Worker, keep=keep_case)
