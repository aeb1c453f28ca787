"""Every figure that the documentation states. ``python benchmarks/run.py`` lists the suites."""
