"""What was measured, and how to measure it again: `python -m benchmarks` lists the programs, README.md the figures."""
