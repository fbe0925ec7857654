"""What several devices and processes exchange in a step, and whether the result changes."""
