"""How a row of float32 becomes packed words: random bits, rounding, row formats, packing."""
