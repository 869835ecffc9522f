"""How much of a tensor is worked on at once."""

import torch


def block_elements(device: torch.device) -> int:
    """Elements of the largest temporary tensor: 8 MiB in float32 on a CPU, about its cache, and 128 MiB on a GPU.

    Smaller blocks leave a GPU idle between kernels: on an H200 those of a CPU take 8 to 11 times as long.
    """
    return 2**21 if device.type == "cpu" else 2**25
