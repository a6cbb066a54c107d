"""Tables of benchmarks, made from the results of their runs."""
