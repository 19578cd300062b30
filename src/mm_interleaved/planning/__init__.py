"""What a training run will need before it is started: memory, time and disk."""
