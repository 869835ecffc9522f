"""refgrid: which reference implementations of LLM kernels are right, against which ground truth, and where."""
