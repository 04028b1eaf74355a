"""The tests. Each runs for every registered strategy (conftest.py), so a new strategy needs no test edited."""
