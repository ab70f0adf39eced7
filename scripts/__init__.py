"""Scripts for users, and the benchmarks."""
