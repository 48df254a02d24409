"""Kernels: operations on tensors, each a folder with one contract, one reference and a module a backend.

This floor knows tensors only: no request, no model, no configuration. Import it as `elastic_decode.kernels`.
"""
