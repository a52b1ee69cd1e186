"""Runs the shootout: gates first, then peak memory in fresh processes, then times in turns."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.cases import DTYPES, SCOPES, Case
from attnzoo.benchmarks.contenders import ORIGINAL, BackendContender, Contender, Original
from attnzoo.benchmarks.measure import machine
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.peers import SCOPE as PEER_SCOPE
from attnzoo.benchmarks.peers import peers_of
from attnzoo.benchmarks.rows import EndToEnd, Row, Shootout
from attnzoo.benchmarks.worker import (
    Problem,
    ProcessWorker,
    Verify,
    Worker,
    as_problem,
    context,
    verify_in_process,
)
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from attnzoo.registry import registry
from attnzoo.spelling import parse, spell

Launch = Callable[[Contender, Case], Worker]
Check = Callable[[Verify], tuple[bool, str]]
Progress = Callable[[float, str], None]

MIN_ROUNDS, MAX_ROUNDS = 3, 9


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        families: names of workloads.
        seq_lens: input lengths in tokens.
        backends: names or aliases, maybe with options (``lsh:num_hashes=2,...``); None: every exact backend of this
            machine.
        scope: see :class:`~attnzoo.benchmarks.cases.Case`.
        modes: of ``False`` (forward) and ``True`` (forward+backward).
        dtype: a key of ``cases.DTYPES``.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        batch: passages.
        original: whether the original runs; without it there are no ratios (where it does not fit into memory).
        layers: of each stack of a whole model, for its memory at lengths that take long; None: as published.
        rounds: timed runs per row; None: from 3 to 9, as :attr:`seconds_per_case` allows.
        seconds_per_case: what the timed runs of one case may take in all, if ``rounds`` is None.
        dense_limit: longest input of dense backends; None: as memory allows.
        train_limit: longest input for forward+backward; None: no limit.
        verify_len: input length of the end-to-end gate.
        peers: other libraries' attention too, which there is in scope ``attention``; None: if that is the scope.
    """

    families: tuple[str, ...] = ("led",)
    seq_lens: tuple[int, ...] = (1024, 2048, 4096)
    backends: tuple[str, ...] | None = None
    scope: str = "model"
    modes: tuple[bool, ...] = (False, True)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    original: bool = True
    layers: int | None = None
    rounds: int | None = None
    seconds_per_case: float = 10.0
    dense_limit: int | None = 1024
    train_limit: int | None = None
    verify_len: int = 1024
    peers: bool | None = None

    def __post_init__(self) -> None:
        for family in self.families:
            find_workload(family)
        if self.scope not in SCOPES:
            raise UnknownNameError("scope", self.scope, SCOPES)
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)
        if self.layers is not None and self.scope != "model":
            raise InvalidArgumentError("layers", f"--layers with scope {self.scope!r}", "--scope model")
        if self.peers and self.scope != PEER_SCOPE:
            raise InvalidArgumentError("peers", f"--peers with scope {self.scope!r}", f"--scope {PEER_SCOPE}")
        _check_device(self.device)
        if not self.families or not self.seq_lens or not self.modes:
            raise InvalidArgumentError("plan", "no model, sequence length or mode", "at least one of each")
        counts = [("seq-len", value) for value in self.seq_lens]
        counts += [("threads", self.threads), ("batch", self.batch)]
        optional = (("rounds", self.rounds), ("layers", self.layers))
        counts += [(name, value) for name, value in optional if value is not None]
        for name, value in counts:
            if value < 1:
                raise InvalidArgumentError(name, value, "an integer >= 1")

    def contenders(self) -> tuple[Contender, ...]:
        """The original, then the backends, aliases resolved, then the peers.

        Raises:
            UnknownNameError, InvalidArgumentError: no such backend, or a bad option of one.
        """
        if self.backends is None:
            names = [info.name for info in registry.backends().values() if info.exact or not info.available]
            limit = self.dense_limit
        else:
            asked = [name for name in self.backends if name != ORIGINAL]
            if "auto" in asked:
                raise InvalidArgumentError("backend", "'auto'", "backends by name: the shootout compares them all")
            parsed = [parse(name) for name in asked]
            for name, options in parsed:
                registry.configure(name, **options)  # a bad option is told now, not after a minute
            names = list(dict.fromkeys(spell(name, options) for name, options in parsed))
            limit = None
        peers = peers_of(self.families) if self.scope == PEER_SCOPE and self.peers is not False else ()
        originals = (Original(),) if self.original else ()
        return (*originals, *(BackendContender(name, limit) for name in names), *peers)

    def cases(self) -> Iterable[Case]:
        """Every cell."""
        for family in self.families:
            for seq_len in self.seq_lens:
                for train in self.modes:
                    machine = (self.dtype, self.device, self.threads)
                    yield Case(family, self.scope, seq_len, self.batch, *machine, train, self.layers)


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device", "'cuda'", f"'cpu': torch {torch.__version__} sees no CUDA device here")


def run(
    plan: Plan,
    progress: Progress = lambda done, text: None,
    launch: Launch | None = None,
    check: Check | None = None,
    contenders: tuple[Contender, ...] | None = None,
) -> Shootout:
    """Run a shootout.

    Args:
        plan: what to run.
        progress: told how much of the work is done (0 to 1) and what happens next.
        launch: starts a worker; None: a fresh process each.
        check: runs the end-to-end gate; None: in a fresh process.
        contenders: who runs; None: :meth:`Plan.contenders`.

    Returns:
        All rows, refused and skipped ones included.
    """
    started, created = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
    chosen = plan.contenders() if contenders is None else contenders
    if launch is None or check is None:
        made = context(find_workload(family).model_class.partition(":")[0] for family in plan.families)
        launch = launch or (lambda contender, case: ProcessWorker(made, contender, case))
        check = check or (lambda job: verify_in_process(made, job))
    versions = machine(plan.device)
    cases = list(plan.cases())
    shares = [float(case.seq_len) * (3 if case.train else 1) for case in cases]
    gates = 0.1
    verdicts = _end_to_end(plan, chosen, check, lambda done, text: progress(gates * done, text))
    found: list[Row] = []
    for number, case in enumerate(cases):
        start = gates + (1 - gates) * sum(shares[:number]) / sum(shares)
        share = (1 - gates) * shares[number] / sum(shares)

        def inside(done: float, text: str, start: float = start, share: float = share) -> None:
            progress(start + share * done, text)

        found += _Cell(plan, case, versions, verdicts, launch, inside).run(chosen)
    return Shootout(
        plan=json.loads(json.dumps(asdict(plan))),
        versions=versions,
        end_to_end=tuple(verdicts),
        rows=tuple(found),
        created=created.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
    )


def _end_to_end(plan: Plan, chosen: Iterable[Contender], check: Check, progress: Progress) -> list[EndToEnd]:
    verdicts = []
    names = [c.name for c in chosen if isinstance(c, BackendContender) and registry.backends()[c.backend].available]
    pairs = [(family, name) for family in plan.families for name in names]
    for number, (family, name) in enumerate(pairs):
        progress(number / len(pairs), f"{family}: {name}, whole model against float64")
        for gradients in sorted(set(plan.modes), reverse=True):
            job = Verify(family, name, plan.verify_len, plan.dtype, plan.device, plan.threads, gradients)
            try:
                ok, report = check(job)
                verdict = status.OK if ok else status.RED
            except Problem as problem:
                verdict, report = problem.status, problem.reason
            verdicts.append(EndToEnd(family, name, plan.verify_len, verdict, report, gradients))
            if verdict != status.REFUSED:
                break  # outputs were compared as well
    return verdicts


class _Cell:
    """One case, all contenders."""

    def __init__(
        self, plan: Plan, case: Case, versions: dict[str, str], verdicts: Sequence[EndToEnd], launch: Launch,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._plan, self._case, self._versions, self._verdicts = plan, case, versions, verdicts
        self._launch, self._progress = launch, progress
        self._workers: dict[str, Worker] = {}
        self._rows: dict[str, Row] = {}
        self._first: dict[str, float] = {}
        self._done = 0.0

    def run(self, chosen: tuple[Contender, ...]) -> list[Row]:
        """Every contender's row, in order."""
        listed = [contender for contender in chosen if contender.listed(self._case)]
        try:
            for number, contender in enumerate(listed):
                self._done = 0.5 * number / len(listed)
                self._rows[contender.name] = self._blank(contender)
                self._admit(contender)
            self._time()
            for name in list(self._workers):
                self._finish(name)
        finally:
            for worker in self._workers.values():
                worker.close()
        original = self._rows.get(ORIGINAL)
        return [row.compared(original) for row in self._rows.values()]

    def _blank(self, contender: Contender) -> Row:
        case = self._case
        workload = find_workload(case.family)
        beyond, notes = workload.too_long(case.seq_len), []
        if beyond is not None:
            notes.append(f"{beyond}; here there are {case.seq_len}")
        if case.layers is not None:
            notes.append(f"{case.layers} layer(s) in each stack, fewer than published")
        return Row(
            case.family, workload.checkpoint, case.scope, contender.name, case.seq_len, case.batch, case.dtype,
            case.device, case.threads, case.mode, self._versions, peer=contender.peer,
            note="; ".join(notes),
        )  # fmt: skip

    def _say(self, name: str, what: str) -> None:
        self._progress(self._done, f"{self._case.family} S={self._case.seq_len} {self._case.mode}: {name}, {what}")

    def _drop(self, name: str, verdict: str, reason: str) -> None:
        self._rows[name] = self._rows[name].silenced(verdict, reason)
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def _admit(self, contender: Contender) -> None:
        """Peak memory and gate; who passes stays for the timed runs."""
        case, name = self._case, contender.name
        whole = find_workload(case.family).obstacle(case.seq_len, case.train) if case.scope == "model" else None
        if whole is not None:
            return self._drop(name, status.SKIPPED, whole)
        limit = self._plan.train_limit
        if limit is not None and case.train and case.seq_len > limit:
            reason = f"forward+backward: left out beyond S={limit} to save time; --full, --train or --seq-len runs it"
            return self._drop(name, status.SKIPPED, reason)
        obstacle = contender.obstacle(case)
        if obstacle is not None:
            available = not isinstance(contender, BackendContender) or registry.backends()[contender.backend].available
            return self._drop(name, status.SKIPPED if available else status.REFUSED, obstacle)
        of_this = (v for v in self._verdicts if (v.family, v.backend) == (case.family, name))
        verdict = next((one for one in of_this if one.bars(case.train)), None)
        if verdict is not None:
            return self._drop(name, verdict.status, f"whole model, end to end: {verdict.report}")
        try:
            self._say(name, "first run, memory")
            worker = self._workers[name] = self._launch(contender, case)
            setup = worker.setup()
            self._say(name, "gate")
            gate = worker.gate()
        except Exception as error:
            problem = as_problem(error)
            return self._drop(name, problem.status, problem.reason)
        self._first[name] = setup.seconds
        self._rows[name] = replace(
            self._rows[name],
            peak_bytes=setup.peak.extra,
            before_bytes=setup.peak.before,
            memory_method=setup.peak.method,
            error=gate.error,
            budget=gate.budget,
            worst=gate.worst or None,
            recall=gate.recall,
            checks=len(gate.checks),
        )
        if not gate.ok:
            self._drop(name, status.RED, gate.complaint)

    def _rounds(self) -> int:
        if self._plan.rounds is not None:
            return self._plan.rounds
        expected = sum(self._first[name] for name in self._workers)
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(self._plan.seconds_per_case / max(expected, 1e-3))))

    def _time(self) -> None:
        """Rounds of one run each; who starts changes from round to round."""
        rounds = self._rounds()
        times: dict[str, list[float]] = {name: [] for name in self._workers}
        for number in range(rounds):
            names = list(self._workers)
            turn = number % max(1, len(names))
            self._done = 0.5 + 0.5 * number / rounds
            for name in names[turn:] + names[:turn]:
                self._say(name, f"round {number + 1} of {rounds}")
                try:
                    times[name].append(self._workers[name].time())
                except Exception as error:
                    problem = as_problem(error)
                    self._drop(name, problem.status, problem.reason)
        for name in self._workers:
            self._rows[name] = self._rows[name].timed(tuple(times[name]))

    def _finish(self, name: str) -> None:
        """Requested is executed, or there is no speed."""
        try:
            executed = self._workers[name].executed()
        except Exception as error:
            problem = as_problem(error)
            return self._drop(name, problem.status, problem.reason)
        self._rows[name] = replace(self._rows[name], kernel=executed.kernel)
        if executed.complaint:
            self._drop(name, status.RED, f"not what was asked for: {executed.complaint}")
