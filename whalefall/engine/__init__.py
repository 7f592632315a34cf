"""Inference: the network, a latent cache, and the loop that continues prompts."""
