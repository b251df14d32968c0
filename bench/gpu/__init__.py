"""What is counted, compiled and measured of the GPU kernels; `static_triton` and `static_cuda` need no GPU."""
