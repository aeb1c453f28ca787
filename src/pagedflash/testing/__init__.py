"""For tests, benchmarks and authors of backends: random problems, and the comparison with float64 they must survive."""

from .compare import as_float64, assert_matches_reference, copy_of, describe
from .problems import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    LAYOUTS,
    MLA_HEAD_DIMS,
    PAGE_SIZES,
    PagedProblem,
    paged_problem,
    random_problem,
)

__all__ = [
    "DTYPES",
    "GROUPS",
    "HEAD_DIMS",
    "LAYOUTS",
    "MLA_HEAD_DIMS",
    "PAGE_SIZES",
    "PagedProblem",
    "as_float64",
    "assert_matches_reference",
    "copy_of",
    "describe",
    "paged_problem",
    "random_problem",
]
