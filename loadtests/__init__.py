"""Load tests and benchmarks of a served policy."""
