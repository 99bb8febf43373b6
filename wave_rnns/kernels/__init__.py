"""Fused CUDA kernels for the scans. CUDA C++ compiled on first use by PyTorch's own NVRTC; without a GPU nothing here runs.

`wave` takes float32, kernels of size 3 and the activations identity, relu and tanh, on compute capability 8.0 or later. So many
neurons n on each of c rings, on a GPU with 227 KB of shared memory a block (9.0; fewer where there is less):

| rings c | faithful: any n / n % 8 == 0 | fast: any n / n % 8 == 0 |
|---|---|---|
| up to 8 | 256 / 1024 | 256 / 1024 |
| up to 16 | 256 / 448 | 256 / 1024 |
| up to 24 | 256 / 384 | 256 / 512 |
| up to 32 | 160 / 192 | 256 / 416 |

`dense` takes up to 256 units (before 9.0: 128). What does not fit runs through PyTorch operations, far more slowly, with one warning
that says why.
"""
