"""The kernels of CUDA devices, in Triton. ``dispatch`` needs no Triton to be imported; the other modules do, but ``configs``.

``configs`` is the one place that decides block sizes, warps and stages. A kernel and its launcher share a file; the row norms of
dense weights (``row_norm``) and of quantised ones (``quantized``) share their loop, whose parts are in ``tiles`` (factors, products,
the end of a sum) and ``codes`` (dequantisation).
"""
