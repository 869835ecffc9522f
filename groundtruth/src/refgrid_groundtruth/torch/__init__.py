"""Ground truth by PyTorch's own operators."""
