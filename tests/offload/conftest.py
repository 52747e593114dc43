"""Every test here runs in a forked process of its own.

Autograd counts devices at a process's first backward pass. One backward in the test process itself
would hide the simulated device, which is registered later, from every fork after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.forked import DEVICES, in_fork


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """`cpu` and `sim` with adversarial queues, `cuda` with real ones."""
    return str(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Run the body in a fork."""
    values = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    kind, text = in_fork(lambda: pyfuncitem.obj(**values), pyfuncitem.funcargs.get("device", "cpu"))
    if kind == "skipped":
        pytest.skip(text)
    if kind == "failed":
        pytest.fail(text, pytrace=False)
    return True


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not find OpenMP threads of their parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
