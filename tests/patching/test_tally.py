"""`attnzoo.stats()`: real kernel calls of the whole process."""

import copy
import gc
import subprocess
import sys
import threading

import pytest
import torch

import attnzoo
from attnzoo.patching.plan import BUILT_IN
from tests.support.subject import build_subject, mask_with_hole


@pytest.fixture
def calls():
    """The calls since the start of the test."""
    gc.collect()
    before = attnzoo.stats()

    def since():
        counts = {name: count - before.get(name, 0) for name, count in attnzoo.stats().items()}
        return {name: count for name, count in counts.items() if count}

    return since


def test_calls_count_by_backend(calls, neox):
    neox.logits()
    assert calls() == {}  # a model without a patch is not counted
    for name in ("sdpa", "eager", "native"):
        with attnzoo.patch(neox.model, name):
            neox.logits()
    assert calls() == {"sdpa": 2, "eager": 2, "native": 2}


def test_auto_counts_at_the_selected_backend(calls, led, monkeypatch):
    monkeypatch.setenv("ATTNZOO_AUTO", "priority")  # a call of the original code would count once for all attentions
    handle = attnzoo.patch(led.model, "auto")
    led.logits()
    selected = {choice.backend.name for site in handle.sites for choice in site.selections}
    assert calls().keys() == selected
    assert sum(calls().values()) == led.attentions


def test_a_selected_native_call_counts_once(calls, led):
    """A site counts such a call in ``kernels`` and in ``selections``. The tally counts the call once."""
    handle = attnzoo.patch(led.model, "auto")
    choice = attnzoo.Choice(BUILT_IN["native"], "measured")
    handle.sites[0].kernels["native"] += 3
    handle.sites[0].selections[choice] += 3
    handle.sites[1].kernels["native"] += 2
    assert calls() == {"native": 5}


def test_a_fallback_counts_as_native(calls, add_backend, neox):
    add_backend("no-mask", mask=False)
    attnzoo.patch(neox.model, "no-mask", fallback="native")
    neox.logits()
    neox.logits(**mask_with_hole(neox))
    assert calls() == {"native": 2, "no-mask": 2}


def test_models_that_are_gone_still_count(calls):
    for _ in range(3):
        subject = build_subject("gpt_neox")
        attnzoo.patch(subject.model, "sdpa")
        subject.logits()
        del subject
        gc.collect()
    assert calls() == {"sdpa": 6}


def test_copies_count_only_what_they_ran(calls, neox):
    attnzoo.patch(neox.model, "sdpa")
    neox.logits()
    twins = [copy.deepcopy(neox.model) for _ in range(3)]
    assert calls() == {"sdpa": 2}
    neox.logits(twins[0])
    assert calls() == {"sdpa": 4}
    del twins
    gc.collect()
    assert calls() == {"sdpa": 4}


def test_the_result_is_a_snapshot(calls, neox):
    before = attnzoo.stats()
    before["sdpa"] = 10**9
    with attnzoo.patch(neox.model, "sdpa"):
        neox.logits()
    assert calls() == {"sdpa": 2}


def test_threads(calls):
    """Sites begin, run and end in threads while another thread reads."""
    subject, done = build_subject("gpt_neox"), threading.Event()
    errors = []

    def work():
        try:
            for _ in range(4):
                twin = copy.deepcopy(subject.model)
                with attnzoo.patch(twin, "sdpa"), torch.no_grad():
                    twin(**subject.inputs)
        except BaseException as error:
            errors.append(error)

    def read():
        while not done.is_set():
            attnzoo.stats()

    reader, workers = threading.Thread(target=read), [threading.Thread(target=work) for _ in range(3)]
    for thread in (reader, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    reader.join()
    gc.collect()
    assert not errors
    assert calls() == {"sdpa": 24}


def test_a_site_that_is_freed_at_the_exit_of_the_interpreter_prints_nothing():
    # While the module exists, Python replaces its global names by None.
    code = "import os; from attnzoo.patching import sites; os.kept = [sites.Site('', 'A', 'full', 'eager'), sites]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
