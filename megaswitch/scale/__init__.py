"""Many runs, and huge ones: studies, fits and comparisons; plans and rehearsals."""
