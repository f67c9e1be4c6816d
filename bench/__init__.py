"""Benchmarks of a source checkout: `python -m bench NAME` or `jaxinfer bench NAME`.

`harness` has the timer and the interleaving, `worker` the processes in which peers run
alone, `peers` the programs that are compared, `routines` what is measured, `report` the tables and
plots. Results are JSON Lines (`jaxinfer.records`) in
`bench/results`.
"""
