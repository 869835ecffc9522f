"""Ground truth of our own: a second formulation of an op in float64, for where no library has a kernel for the machine.

Written from the op's definition and not from its reference: another decomposition, no shared code.
"""
