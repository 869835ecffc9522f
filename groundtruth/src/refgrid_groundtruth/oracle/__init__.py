"""Ground truth of our own: a second formulation of an op in float64, for where no library has a kernel for the machine.

And for attention, whose libraries multiply probabilities in the dtype: beside them a reference that sums in bfloat16,
or truncates what it should round, is as good as they are; beside float64 it is not.

Written from the op's definition and not from its reference: another decomposition, no shared code.
"""
