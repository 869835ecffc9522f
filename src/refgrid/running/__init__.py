"""A run under pytest-xdist: devices and their leases, the order of cases, workers and what survives them."""
