"""What is to be proven: definitions with their references, workloads, and the cases that they make."""
