"""Short kernels in Numba-CUDA that run in its simulator: what a scan and a tiled attention do on a GPU, step by step."""
