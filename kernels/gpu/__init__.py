"""The operators on CUDA devices, in Triton."""
