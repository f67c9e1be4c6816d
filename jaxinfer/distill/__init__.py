"""Small learned parts that stand in for expensive ones: the maths; the loops are in `train`."""
