"""The shootout: the original model against every backend of this machine, on real text, behind a correctness gate.

Run it with ``attnzoo bench``, or from Python with :func:`attnzoo.benchmarks.runner.run`. Glossary:

- plan: what the user asks for. It expands to cases: one family, scope, input length, mode, dtype and device each.
- contender: a participant of a case: the original, a backend, or a peer (the attention of another library).
- subject: the PyTorch module that a contender runs in a case: a whole model or one attention module.
- row: the result of one contender in one case, measured in its own process. Its gate compares it with float64.
- kernel: the code that computed the attention, by the name that the backend reports. A witness checks that name.
"""
