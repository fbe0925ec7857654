"""What does a step, a batch and a checkpoint cost on a CPU, beside the field?"""
