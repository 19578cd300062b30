"""Training: configuration, optimizer, the trainer, the autoencoder's own training."""
