"""What need not run again: the key of a case, the evidence that it is unchanged, and what is still due."""
