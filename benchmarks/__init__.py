"""The shootout: the original model against every backend this machine has, on real text, behind a correctness gate.

``attnzoo bench`` is its command; :func:`attnzoo.benchmarks.runner.run` the same from Python.
"""
