"""Filters [F, L] become sums of K decaying modes each, with a certificate and a report.

`distill.distill_filters` is what users call. From the bottom: `modes` (least squares on the host),
`spectrum` (singular values of Hankel matrices by FFT), `certificate` (what no model of an order can
beat), `realize` (poles from singular vectors), `refine` (Optax), `baselines`, `rational` and
`dictionary` (other methods), `methods` (all by name), `order` (modes and taps by tolerance),
`report`.
"""
