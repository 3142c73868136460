"""Figures of runs and searches, drawn from the files that they leave."""
