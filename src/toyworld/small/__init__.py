"""Training of the small model: scenes composed on the GPU, packed rows of fixed sizes, and one captured step."""
