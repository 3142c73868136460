"""Engines: one class per runtime that turns a bundle into a `Policy`."""
