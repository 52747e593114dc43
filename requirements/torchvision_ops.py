"""Lets the torchvision of PyPI be imported beside a CPU build of torch.

PyPI's torchvision is built against the CUDA build of torch. Beside a CPU build its library of
operators is passed over, and then its import ends at the first operator that gets a fake kernel
without having been declared. timm and rfdetr import torchvision and call none of these operators,
so it is enough to declare them.

    .venv-test/bin/python requirements/torchvision_ops.py    # as requirements/install.sh does

copies this file into the environment, which then imports it at every start, or takes it out again
where torchvision can do without. Operators that were only declared raise when they are called.
"""

import shutil
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "torchvision_ops"
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declaring(MetaPathFinder):
    """Finds torchvision as usual, and declares its operators before it runs."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """For torchvision a specification whose loader declares first; None for all others."""
        spec = PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        # Not before: who only asks whether torchvision is there shall not wait for torch.
        def declare_and_run(module: ModuleType) -> None:
            from torch.library import Library

            # An operator is declared for as long as its library lives.
            self.library = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                self.library.define(operator + SIGNATURE)  # type: ignore[no-untyped-call]
            run(module)

        spec.loader.exec_module = declare_and_run  # type: ignore[method-assign]
        return spec


def main() -> None:
    """Put this file into the environment, or take it out."""
    packages = Path(sysconfig.get_path("purelib"))
    start = packages / f"{NAME}.pth"
    # This process is to see torchvision as it is without this file.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "Declaring"]
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        shutil.copyfile(__file__, packages / f"{NAME}.py")
        start.write_text(f"import {NAME}\n")
    else:
        start.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
else:
    sys.meta_path.insert(0, Declaring())
