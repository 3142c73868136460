"""Dialects: one file per wire format; each turns bytes into a request and an answer into bytes."""
