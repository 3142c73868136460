"""Peers for `make bench`: each file serves the same bundle the way its own documents show."""
