"""Comparisons that are many training runs: one command each, resumable."""
