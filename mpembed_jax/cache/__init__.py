"""The FP32 cache: its sizes, its bookkeeping, the policies LFU and LRU, and the plan of a step."""
