"""The local replacement model: one forward made affine in its embeddings, features, errors and biases."""
