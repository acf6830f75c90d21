"""What many runs say together: studies, fits, comparisons."""
