"""The verbs of users, and the benchmarks."""
