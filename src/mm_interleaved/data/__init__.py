"""Readers of training data and their mixture, down to batches."""
