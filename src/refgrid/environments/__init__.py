"""Version sets: declared, locked, audited, and which of them this machine can run."""
