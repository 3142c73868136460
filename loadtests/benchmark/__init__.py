"""The parts of `make bench`: targets, their processes, the drivers and the report."""
