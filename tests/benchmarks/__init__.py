"""Benchmarks: they measure and print, beside what was aimed at and beside supervisor; they assert no times.

``python -m tests.benchmarks`` runs all of them, ``python -m tests.benchmarks.<name>`` one of them.
"""
