"""Benchmarks of CPUs."""
