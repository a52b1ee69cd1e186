"""Any sequence of install, uninstall, load, save, switch, patch and unpatch: models run what was requested last."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

import attnzoo
from tests.installing.conftest import transformers_state
from tests.support.subject import build_subject

LONG = os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE") == "long"
defaults = st.sampled_from([None, "sdpa", "eager"])
names = st.sampled_from([None, "eager", "sdpa", "attnzoo/sdpa", "attnzoo/eager", "native", "attnzoo/spda", "flash"])


@dataclass(eq=False)
class Loaded:
    """A model with what is expected of it.

    Attributes:
        backend: the backend of the patch that `install` made, or None.
        saved: the name that the configuration remembers, or None.
        patches: handles and backends of the user's patches.
    """

    model: Any
    backend: str | None
    saved: str | None
    patches: list[tuple[Any, str]] = field(default_factory=list)


class Installs(RuleBasedStateMachine):
    """A state machine with up to three models, which are loaded from one folder."""

    kind: str

    @initialize()
    def begin(self):
        self.transformers = transformers_state()
        self.subject = build_subject(self.kind)
        self.logits = self.subject.logits()
        self.folder = tempfile.TemporaryDirectory()
        self.subject.model.save_pretrained(self.folder.name)
        self.installed, self.default, self.models, self.blocks = False, None, [], []

    # What is expected

    @property
    def active(self):
        """Whether attnzoo is installed, and the default."""
        return self.blocks[-1][1] if self.blocks else (self.installed, self.default)

    def served(self, name, saved=None):
        """Return the backend and the remembered name for a requested name. Raise KeyError if the name is refused."""
        active, default = self.active
        if not active:
            if name in (None, "eager") or (name == "sdpa" and self.kind == "gpt_neox"):
                return None, saved  # transformers keeps the entry of config.json, which it does not know
            raise KeyError(name)
        if name in ("attnzoo/spda", "flash"):
            raise KeyError(name)
        if name is None:
            return saved or default, saved
        if name == "eager" or (name == "sdpa" and self.kind == "gpt_neox"):
            return None, None
        backend = name.removeprefix("attnzoo/")
        return backend, backend

    # Actions

    @rule(default=defaults)
    def install(self, default):
        attnzoo.install(default)
        self.installed, self.default = True, default

    @rule()
    def uninstall(self):
        attnzoo.uninstall()
        self.installed, self.default = False, None

    @rule(default=defaults)
    def enter(self, default):
        block = ExitStack()
        block.enter_context(attnzoo.installed(default))
        self.blocks.append((block, (True, default)))

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self):
        self.blocks.pop()[0].close()

    @precondition(lambda self: len(self.models) < 3)
    @rule(name=names)
    def load(self, name):
        self.load_from(self.folder.name, name)

    def load_from(self, folder, name, saved=None):
        if not self.active[0] and name is not None and "/" in name:
            return  # for transformers without attnzoo, a kernel of the hub
        options = {} if name is None else {"attn_implementation": name}
        try:
            backend, saved = self.served(name, saved)
        except KeyError:
            with pytest.raises((attnzoo.AttnzooError, ValueError, ImportError)):
                type(self.subject.model).from_pretrained(folder, **options)
            return
        model = type(self.subject.model).from_pretrained(folder, **options).eval()
        self.models.append(Loaded(model, backend, saved))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), name=names)
    def save_and_load(self, data, name):
        loaded = data.draw(st.sampled_from(self.models))
        with tempfile.TemporaryDirectory() as folder:
            loaded.model.save_pretrained(folder)
            self.models.remove(data.draw(st.sampled_from(self.models)))
            self.load_from(folder, name, loaded.saved)

    @precondition(lambda self: self.models and self.active[0])
    @rule(data=st.data(), name=names.filter(bool))
    def switch(self, data, name):
        loaded = data.draw(st.sampled_from(self.models))
        try:
            backend, saved = self.served(name)
            if loaded.patches and (backend or loaded.backend):
                raise KeyError(name)
        except KeyError:
            with pytest.raises((attnzoo.AttnzooError, ValueError)):
                loaded.model.set_attn_implementation(name)
            return
        loaded.model.set_attn_implementation(name)
        loaded.backend, loaded.saved = backend, saved

    @precondition(lambda self: self.models)
    @rule(data=st.data(), backend=st.sampled_from(["sdpa", "eager", "native"]))
    def patch(self, data, backend):
        loaded = data.draw(st.sampled_from(self.models))
        loaded.patches.append((attnzoo.patch(loaded.model, backend), backend))

    @precondition(lambda self: any(loaded.patches or loaded.backend for loaded in self.models))
    @rule(data=st.data())
    def unpatch(self, data):
        loaded = data.draw(st.sampled_from([each for each in self.models if each.patches or each.backend]))
        attnzoo.unpatch(loaded.model)
        if loaded.patches:
            loaded.patches.pop()
        else:
            loaded.backend = None

    # Invariants

    @rule()
    def every_model_runs_what_was_requested_last(self):
        for loaded in self.models:
            top = loaded.patches[-1][1] if loaded.patches else loaded.backend
            before = attnzoo.stats()
            logits = self.subject.logits(loaded.model)
            ran = {name for name, count in attnzoo.stats().items() if count != before.get(name, 0)}
            assert ran == ({top} if top else set())
            assert self.subject.close(logits, self.logits)

    @invariant()
    def sites_are_what_was_asked_for(self):
        for loaded in self.models:
            top = loaded.patches[-1][1] if loaded.patches else loaded.backend
            assert attnzoo.is_patched(loaded.model) is (top is not None)
            if top is not None:
                assert {site.backend for site in attnzoo.handle(loaded.model).sites} == {top}
            assert getattr(loaded.model.config, "attnzoo_backend", None) == loaded.saved

    @invariant()
    def transformers_is_changed_only_while_installed(self):
        if not self.installed and not self.blocks:
            assert transformers_state() == self.transformers

    def teardown(self):
        if not hasattr(self, "models"):
            return
        while self.blocks:
            self.leave()
        attnzoo.uninstall()
        self.folder.cleanup()
        assert transformers_state() == self.transformers
        assert torch.equal(self.subject.logits(), self.logits)


@pytest.mark.parametrize("kind", ["led", "gpt_neox"])
def test_any_sequence_leaves_transformers_as_it_was(kind):
    machine = type(f"Installs_{kind}", (Installs,), dict(kind=kind))
    examples, steps = (10, 100) if LONG else (8, 12)
    profile = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_machine(machine, settings=profile)
