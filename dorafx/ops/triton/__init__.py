"""The row norm on CUDA devices as one Triton kernel. ``dispatch`` needs no Triton to be imported; the other modules do.

``configs`` is the one place that decides block sizes, warps and stages; the kernel and its launcher share a file.
"""
