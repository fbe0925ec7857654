"""What each format, cache, policy and rounding costs in AUC, beside baselines of equal bytes."""
