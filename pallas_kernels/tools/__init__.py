"""For tests, benchmarks and ahead-of-time compilation; no op imports it."""
