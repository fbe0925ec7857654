"""Kernels and steps on a GPU: checked and timed on one, compiled ahead of time without one, floors on paper."""
