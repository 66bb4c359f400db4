"""Timings against peers: ``python -m pytest benchmarks --benchmark-only``, or ``report.py``."""
