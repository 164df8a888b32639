"""Measures an OpenAI-compatible server from outside: workload, load, measurements, report."""
