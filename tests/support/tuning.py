"""Attentions and models for the tests of tuning, measurements by hand, and the choices of ``auto``."""

import torch

import attnzoo
from attnzoo.auto import cache, environment
from attnzoo.auto.measurements import Measurement, Outcome, size_class, to_plain_data
from attnzoo.auto.selection import AutoBackend
from attnzoo.registry import registry
from tests.support.models import gpt_neox

# ``auto`` without the model's code, so that every call selects a backend.
OURS = AutoBackend(native="never")


def attention(length=37, batch=2, grad=False, **changes):
    random = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, batch, 2, length, 4, generator=random).requires_grad_(grad)
    segment = attnzoo.Segment(k, v, changes.pop("pattern", attnzoo.Causal()), **changes)
    return attnzoo.Attention(q, (segment,), 0.5)


def neox_inputs(length=21):
    return dict(input_ids=torch.arange(3, 3 + length)[None], use_cache=False)


def tune(clock, model=None, inputs=None, **changes):
    return attnzoo.tune(gpt_neox() if model is None else model, inputs or neox_inputs(), clock=clock, **changes)


def took(model=None, inputs=None):
    """The backend that ``auto`` chooses at the first site of a model, in a run without gradients."""
    model = gpt_neox() if model is None else model
    with attnzoo.patch(model, OURS) as handle, torch.no_grad():
        model(**(inputs or neox_inputs()))
    (choice,) = handle.sites[0].selections
    return choice


def forget():
    """Forget the measurements in memory, as a new process would. The file stays."""
    cache.forget()


def files():
    """Names of the cache files."""
    return sorted(path.name for path in cache.folder().glob("*")) if cache.folder().is_dir() else []


def measured(attention, seconds):
    """Store a measurement of an attention. ``seconds`` maps backends to seconds, or to the reason why one is wrong."""
    outcomes = {}
    for name, result in seconds.items():
        code, wrong = environment.code_of(registry.backend_class(name)), isinstance(result, str)
        outcomes[name] = Outcome(code, None if wrong else result, reason=result if wrong else "", wrong=wrong)
    measurement = Measurement(to_plain_data(attention.request()), size_class(attention), outcomes, "by hand")
    cache.add(environment.environment_of(attention.query.device), [measurement], save=True)
