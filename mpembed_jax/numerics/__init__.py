"""Numerics of low-precision rows: random bits, rounding, row formats and packing into words."""
