"""What several benchmarks share: reports, networks of their own, adapters of other code."""
