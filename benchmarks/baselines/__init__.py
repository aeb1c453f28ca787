"""What pagedflash is compared with: one module each, of functions from a problem to a contender.

A function raises ImportError where its package is not installed, and :class:`benchmarks.suite.CannotRun` where the package
cannot do the problem; the suite then goes on without it, and says so.
"""
