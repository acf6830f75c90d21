"""Floor 5. The training loop and what it shows: objectives, metrics, validation, generation."""
