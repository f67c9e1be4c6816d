"""Cache policies on the read, merge, commit protocol of `jaxinfer.cache.base`."""
