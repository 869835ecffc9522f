"""Ground truth by the modeling code of HuggingFace transformers: plain PyTorch, run on a CPU or on CUDA."""
