"""A backend of one's own: a module with two constants and four functions. This one is plain attention over dense keys.

python examples/new_backend.py      runs the conformance suite on it
"""

import sys

import torch
from torch import Tensor

from pagedflash.backends import reference
from pagedflash.backends.protocol import Capabilities, Support
from pagedflash.problem import AttentionProblem, CacheWrite
from pagedflash.testing import conformance

NAME = "plain"
CAPABILITIES = Capabilities()


def available() -> Support:
    return Support(True)


def supports(problem: AttentionProblem) -> Support:
    """What is said no to runs on the reference, with a warning that gives the reason."""
    scores, cache = problem.scores, problem.cache
    if problem.layout != "dense" or cache.seqused_k is not None or cache.cache_batch_idx is not None:
        return Support(False, "it attends to dense keys without lengths")
    if scores.sinks is not None or scores.alibi_slopes is not None:
        return Support(False, "it has no sinks and no ALiBi slopes")
    return Support(True)


def attention(problem: AttentionProblem, out: Tensor | None = None, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.float().transpose(1, 2) for tensor in (problem.queries.q, problem.cache.k, problem.cache.v))
    k, v = (tensor.repeat_interleave(problem.group, dim=1) for tensor in (k, v))
    options = problem.scores
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    queries, keys = scores.shape[-2:]
    ahead = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)  # of a query
    if options.window_left >= 0:
        scores = scores.masked_fill(ahead < -options.window_left, -torch.inf)
    if options.window_right >= 0:
        scores = scores.masked_fill(ahead > options.window_right, -torch.inf)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # no key was seen: the output is 0
    result = ((scores - lse[..., None]).exp() @ v).transpose(1, 2).to(problem.queries.q.dtype)
    return (result.contiguous() if out is None else out.copy_(result)), lse


def kv_write(write: CacheWrite) -> None:
    reference.kv_write(write)


if __name__ == "__main__":
    sys.modules["new_backend"] = sys.modules[__name__]
    sys.exit(conformance.main(["--backend", "new_backend"]))
