"""What a user meets first: ``import pagedflash`` is quick, silent, and brings in no more than torch."""

from __future__ import annotations

import subprocess
import sys

SECONDS = 0.3
"""Beyond torch; 0.05 on the machine this was written on."""

SCRIPT = """
import sys, time, torch, warnings
before = set(sys.modules)
warnings.simplefilter("error")
start = time.perf_counter()
import pagedflash, pagedflash.transformers
print(time.perf_counter() - start)
new = {name.partition(".")[0] for name in sys.modules.keys() - before}
assert not new & {"transformers", "triton", "rich", "click", "matplotlib", "metalsim", "sympy"}, new
"""


def test_import() -> None:
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
        assert not done.returncode and not done.stderr, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < SECONDS
