"""Run folders, records, checkpoints, processes: what keeps long work safe."""
