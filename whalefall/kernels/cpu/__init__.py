"""Kernels of the CPU, compiled by Numba: what decoding does between the library's products.

A call of torch takes two to ten microseconds on a CPU, however little it does, and a token of a
small network is hundreds of them. Here an operation is one call of about one microsecond, as it is
one kernel on CUDA. All take and give FP32.
"""
