"""What a compiled program does: HLO, copies, GPU targets and rooflines."""
