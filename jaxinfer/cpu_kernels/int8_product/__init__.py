"""Products of a few rows with weights of 8 bits, several weights at once."""

from jaxinfer.cpu_kernels.int8_product.api import fits, int8_products

__all__ = ["fits", "int8_products"]
