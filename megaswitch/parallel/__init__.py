"""Floor 1. Process groups, sharding declarations and collectives; knows nothing of models."""
