"""What people run: training, tables and benchmarks."""
