"""Files to weights and back: the original release's files, base components, the hub, quantization."""
