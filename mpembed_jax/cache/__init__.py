"""Who may sit in a line of the FP32 cache: sizes, residency, the policies LFU and LRU, the plan of a step."""
