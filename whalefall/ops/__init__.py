"""Arithmetic: number formats and kernels. One file an operation, each with a plain reference."""
