"""CPU kernels through XLA's FFI; each folder holds an API and C++ sources. What they
compute is defined by the forms for XLA in `jaxinfer.nn`, which compute where kernels do not."""
