"""Hyperparameter search: many training runs of one search file, on Ray Tune."""
