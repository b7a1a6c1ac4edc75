"""Packed operations on token streams: a readable torch reference per operation."""
