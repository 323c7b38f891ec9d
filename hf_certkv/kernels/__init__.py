"""Kernels: `reference` is the specification in plain torch; faster ones keep its signatures."""
