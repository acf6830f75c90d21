"""Runs on paper and in rehearsal: what a rank of a huge world would hold, send and compute."""
