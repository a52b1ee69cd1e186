"""An ``Attend`` without a model, which records the attentions that it ran."""

import attnzoo
from attnzoo.functional import execute
from attnzoo.registry import registry


class RecordingAttend:
    """An :class:`attnzoo.Attend` that records the attentions it ran."""

    def __init__(self, backend, takes=True):
        self.backend = backend if isinstance(backend, attnzoo.Backend) else registry.make_backend(backend)
        self.ran, self._takes = [], takes

    def __call__(self, attention, probabilities=False):
        self.ran.append(attention)
        return execute(self.backend, attention, probabilities)

    def takes(self, attention):
        return self._takes and not registry.refusals(self.backend, attention.request())

    def cached_per_forward(self, tensor, name, make):
        return make(tensor)
