"""The packages of the distribution: ``adapters/`` and ``benchmarks/`` are installed inside ``attnzoo``."""

from setuptools import find_packages, setup

inner = [f"attnzoo.{name}" for name in find_packages("attnzoo")]
benchmarks = [f"attnzoo.benchmarks.{name}" for name in find_packages("benchmarks")]
setup(packages=["attnzoo", *inner, "attnzoo.adapters", "attnzoo.benchmarks", *benchmarks])
