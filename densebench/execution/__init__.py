"""What strategies that compute a stage themselves share: norms' bookkeeping, dtypes, preallocated maps."""
