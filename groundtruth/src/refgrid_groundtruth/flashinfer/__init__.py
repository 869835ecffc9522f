"""Ground truth by FlashInfer's CUDA kernels.

Sources of 0.5.3, 0.6.7.post3, 0.6.12 and 0.7.2.post1 were read: only arguments that all of them take are passed, beyond
the leading ones by keyword. Its lse is base 2 already.
"""
