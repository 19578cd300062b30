"""Pre-training of the small model's parts: autoencoder, visual tokenizer, language model."""
