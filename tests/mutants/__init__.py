"""Mutation testing: plant small faults in the source, one at a time, and count how many the tests catch.

``make mutants`` runs it. The mutations come from mutmut's operators (https://github.com/boxed/mutmut).
"""
