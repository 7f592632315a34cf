"""The network, and nothing but the network."""
