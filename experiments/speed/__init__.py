"""What a step, a batch of data and a checkpoint cost, alone and beside the field."""
