"""The kernels for CUDA devices, in Triton. Importing these modules needs Triton, except for ``configs``.

``configs`` alone decides block sizes, warps and stages. A kernel and its launcher share a file. The row norms of dense weights
(``row_norm``) and of quantised weights (``quantized``) share their loop, whose parts are in ``tiles`` (factors, products, the end of
a sum) and ``codes`` (dequantisation).
"""
