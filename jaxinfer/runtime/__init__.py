"""What running a compiled program takes: compilation and its cache, memory estimates, layouts."""
