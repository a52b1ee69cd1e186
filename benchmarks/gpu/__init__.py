"""Everything that is worth measuring on somebody's GPU, in the order of importance, within a number of seconds.

``python -m attnzoo.benchmarks.gpu --seconds 3600 --out DIR`` runs it. In a checkout without an installation, run
``make gpu`` or ``python benchmarks/gpu/checkout.py`` with the same options.
"""
