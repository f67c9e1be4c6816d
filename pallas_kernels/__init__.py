"""GPU kernels; each folder holds an API, a `jnp` reference and a Triton version."""
