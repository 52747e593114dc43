"""Every test here runs in a forked process of its own.

Autograd counts devices at a process's first backward pass. One backward in the test process itself
would hide the simulated device, which is registered later, from every fork after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.forked import DEVICES, in_fork


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "cuda: computes on a CUDA device, skipped without one; `python -m pytest tests/offload -m"
        " cuda` is the first command on a card",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a card, before pytest selects by marker.

    The long matrix stays apart: on a card it is run by `-m full`.
    """
    for item in items:
        on_card = isinstance(item, pytest.Function) and device_of(item) == "cuda"
        if on_card and item.get_closest_marker("full") is None:
            item.add_marker("cuda")


def device_of(item: pytest.Function) -> str:
    """The device of a test that is run once for each."""
    return str(item.callspec.params.get("device", "cpu")) if hasattr(item, "callspec") else "cpu"


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
