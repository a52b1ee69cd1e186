"""Check every backend of this machine against the oracle, then time the original model and the backends on real text.

Start a run with ``attnzoo bench``, or from Python with :func:`attnzoo.benchmarks.runner.run`. A run is a *shootout*.

- plan: the options of a shootout. Each case of a plan has one family, scope, length, mode, dtype and device.
- contender: the code that a case measures: the original model, a backend, or a peer (attention of another library).
- subject: the PyTorch module that a contender runs in a case: a whole model or one attention module.
- row: the result of one contender in one case, measured in a separate process.
- gate: the check of a contender's numbers against the float64 oracle, under the error rule.
- kernel: the code that computed the attention. ``witness.py`` checks the kernel name that a backend reports.
"""
