"""Benchmark: time the original model and every backend of this machine on real text, after a correctness check.

Run it with ``attnzoo bench``, or from Python with :func:`attnzoo.benchmarks.runner.run`. Glossary:

- plan: the options of a shootout. A plan expands to cases, each with one family, scope, length, mode, dtype and device.
- contender: what runs in a case: the original model, a backend, or a peer. A peer is the attention of another library.
- subject: the PyTorch module that a contender runs in a case: a whole model or one attention module.
- row: the result of one contender in one case, measured in a separate process.
- gate: the comparison of a contender with the float64 oracle, under the error rule.
- kernel: the code that computed the attention, by the name that the backend reports. The witness checks this name.
"""
