"""How text becomes batches of tokens."""
