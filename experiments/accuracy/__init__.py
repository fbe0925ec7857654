"""What does each format, cache, policy and rounding cost in AUC, per byte?"""
