"""Adapters for SGLang and its kernels (sgl_kernel), which are a distribution of their own."""
