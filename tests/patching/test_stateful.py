"""Any sequence of patches and removals restores the bit-identical original."""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

import attnzoo
from tests.support.subject import Snapshot, build_subject

LONG = os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE") == "long"
backends = st.sampled_from(["eager", "sdpa", "auto", "native"])


class Patches(RuleBasedStateMachine):
    """Two models with one config object. The steps patch, unpatch, copy and save only the first model.

    ``stack`` is the expected state: for each patch, its handle and the backend of each site it covers.
    """

    kind: str

    @initialize()
    def begin(self):
        self.subject = build_subject(self.kind)
        self.other = build_subject(self.kind, config=self.subject.model.config, seed=2)
        self.before, self.others_before = Snapshot(self.subject), Snapshot(self.other)
        self.stack = []

    # Actions

    @rule(backend=backends)
    def patch(self, backend):
        handle = attnzoo.patch(self.subject.model, backend)
        self.stack.append((handle, dict.fromkeys(self.subject.sites, backend)))

    @rule(data=st.data())
    def patch_some(self, data):
        sites = self.subject.sites
        chosen = data.draw(st.dictionaries(st.sampled_from(sites), backends, min_size=1))
        rest = data.draw(st.none() | backends)
        globs = {**chosen, **({} if rest is None else {"*": rest})}
        handle = attnzoo.patch(self.subject.model, globs)
        expected = {site: chosen.get(site, rest) for site in sites if site in chosen or rest is not None}
        self.stack.append((handle, expected))

    @rule(backend=st.sampled_from(["spda", "", "flash3"]))
    def patch_badly(self, backend):
        with pytest.raises(attnzoo.AttnzooError):
            attnzoo.patch(self.subject.model, {"*": backend, self.subject.sites[0]: "eager"})

    @rule(backends=st.lists(backends, min_size=1, max_size=3), fails=st.booleans())
    def nested_contexts(self, backends, fails):
        def nest(rest):
            if not rest:
                self.check_what_runs()
                if fails:
                    raise KeyError("in the middle")
                return
            with attnzoo.patch(self.subject.model, rest[0]) as handle:
                self.stack.append((handle, dict.fromkeys(self.subject.sites, rest[0])))
                try:
                    nest(rest[1:])
                finally:
                    self.stack.pop()

        try:
            nest(backends)
        except KeyError:
            assert fails

    @precondition(lambda self: self.stack)
    @rule(by_handle=st.booleans())
    def unpatch(self, by_handle):
        handle, _ = self.stack.pop()
        if by_handle:
            handle.remove()
        else:
            attnzoo.unpatch(self.subject.model)
        assert not handle.active
        handle.remove()

    @precondition(lambda self: len(self.stack) > 1)
    @rule(data=st.data())
    def remove_in_any_order(self, data):
        """The removal succeeds if and only if no later patch covers one of the sites."""
        number = data.draw(st.integers(0, len(self.stack) - 2))
        handle, covered = self.stack[number]
        if any(covered.keys() & later.keys() for _, later in self.stack[number + 1 :]):
            with pytest.raises(attnzoo.PatchError, match="last in, first out"):
                handle.remove()
            assert handle.active
        else:
            handle.remove()
            del self.stack[number]

    @precondition(lambda self: not self.stack)
    @rule()
    def unpatch_what_is_not_patched(self):
        with pytest.raises(attnzoo.PatchError, match="not patched"):
            attnzoo.unpatch(self.subject.model)

    @rule()
    def save_and_reload(self):
        model, training = self.subject.model, self.subject.model.training
        with tempfile.TemporaryDirectory() as folder:
            config = copy.deepcopy(vars(model.config))
            model.save_pretrained(folder)
            vars(model.config).clear()  # saving itself writes dtype and architectures into the config
            vars(model.config).update(config)
            loaded = type(model).from_pretrained(folder).eval()
        assert model.training is training
        assert all(map(torch.equal, loaded.state_dict().values(), self.before.state.values()))
        assert list(loaded.state_dict()) == list(self.before.state)
        assert torch.equal(self.subject.logits(loaded), self.before.logits)
        assert all("forward" not in vars(module) for module in loaded.modules())

    @rule()
    def deep_copy(self):
        twin = copy.deepcopy(self.subject.model)
        calls = [[site.calls for site in handle.sites] for handle, _ in self.stack]
        assert torch.equal(self.subject.logits(twin), self.subject.logits())
        for (handle, _), before in zip(self.stack[:-1], calls[:-1], strict=True):
            assert all(site.calls - count <= 2 for site, count in zip(handle.sites, before, strict=True))
        removed = 0
        while any("forward" in vars(module) for module in twin.modules()):
            attnzoo.unpatch(twin)
            removed += 1
        assert removed == len(self.stack)
        assert torch.equal(self.subject.logits(twin), self.before.logits)
        assert all(handle.active for handle, _ in self.stack)

    @rule(training=st.booleans())
    def switch(self, training):
        self.subject.model.train(training)

    @rule()
    def train_a_step(self):
        """Gradients flow under any patch, and weights do not change."""
        self.subject.model.zero_grad(set_to_none=True)
        logits = self.subject.model(**self.subject.inputs).logits
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in self.subject.model.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        self.subject.model.zero_grad(set_to_none=True)

    # Invariants

    @rule()
    def check_what_runs(self):
        """Only the last patch of each module runs, on the requested backend."""
        top = {site: (handle, covered[site]) for handle, covered in self.stack for site in covered}
        sites = {(id(handle), site.name): site for handle, _ in self.stack for site in handle.sites}
        calls = {key: site.calls for key, site in sites.items()}
        kernels = {key: site.kernels.copy() for key, site in sites.items()}
        logits = self.subject.logits()
        for (owner, name), site in sites.items():
            handle, backend = top[name]
            ran = site.kernels - kernels[owner, name]
            if id(handle) != owner:
                assert not ran, f"{name}: a patch below ran"
                continue
            assert site.calls - calls[owner, name] == ran.total() > 0
            assert site.backend == backend
            others = {"eager"} if backend == "auto" else {"eager", "native"}
            assert (set(ran) == {backend}) if backend in ("eager", "native") else not others & set(ran)
        assert self.subject.close(logits, self.before.logits)
        if all(backend == "native" for _, backend in top.values()):
            assert torch.equal(logits, self.before.logits)

    @invariant()
    def sites_are_what_was_asked_for(self):
        for handle, covered in self.stack:
            assert {site.name: site.backend for site in handle.sites} == covered
            assert handle.active
        patched = {site for _, covered in self.stack for site in covered}
        for number, name in enumerate(self.subject.sites):
            assert ("forward" in vars(self.subject.module(number))) is (name in patched)

    @invariant()
    def the_other_model_never_notices(self):
        assert torch.equal(self.other.logits(), self.others_before.logits)
        assert self.other.model.config is self.subject.model.config

    def teardown(self):
        if not hasattr(self, "stack"):
            return
        while self.stack:
            self.stack.pop()[0].remove()
        self.subject.model.eval()
        self.before.assert_unchanged()
        self.others_before.assert_unchanged()


@pytest.mark.parametrize("kind", ["led", "gpt_neox"])
def test_any_sequence_of_patches_restores_the_original(kind):
    machine = type(f"Patches_{kind}", (Patches,), dict(kind=kind))
    examples, checks = settings().max_examples if LONG else 30, list(HealthCheck)
    profile = settings(max_examples=examples, stateful_step_count=15, deadline=None, suppress_health_check=checks)
    run_machine(machine, settings=profile)
