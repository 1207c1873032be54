"""Hostile adapters, a fuzzer and a killer, and what must be left standing: see attacks/README.md."""
