"""Floor 4. Optimizers and learning-rate schedules; parameters tell their sharding themselves."""
