"""Triton and Gluon kernels for Hopper, launched by ``ops``: how, where ``ops`` says what."""
