"""Floor 4. What outlives a run: checkpoints, and other programs' formats."""
