"""What the tests of tuning measure, and how they look at what ``auto`` took."""

import torch

import attnzoo
from attnzoo.auto import cache, environment
from attnzoo.auto.measurements import Measurement, Outcome, plain, size_class
from attnzoo.registry import registry
from tests.support.models import gpt_neox


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
    """What ``auto`` takes at the first site of a run without gradients, and why."""
    model = gpt_neox() if model is None else model
    with attnzoo.patch(model) as handle, torch.no_grad():
        model(**(inputs or neox_inputs()))
    (choice,) = handle.sites[0].selections
    return choice


def forget():
    """What another process would start with: the file, and nothing in memory."""
    cache.forget()


def files():
    return sorted(path.name for path in cache.folder().glob("*")) if cache.folder().is_dir() else []


def measured(attention, seconds):
    """Write down seconds by backend name, or what was wrong with it, as a tune of an attention would."""
    outcomes = {}
    for name, found in seconds.items():
        code, wrong = environment.code_of(registry.backend_class(name)), isinstance(found, str)
        outcomes[name] = Outcome(code, None if wrong else found, reason=found if wrong else "", wrong=wrong)
    one = Measurement(plain(attention.request()), size_class(attention), outcomes, "by hand")
    cache.add(environment.environment_of(attention.query.device), [one], save=True)
