"""Compiled programs: ahead-of-time compilation, HLO inspection, GPU targets, memory, rooflines."""
