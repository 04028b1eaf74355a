"""Predictions held against what the allocator does."""
