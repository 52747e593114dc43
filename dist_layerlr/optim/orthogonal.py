"""The orthogonal factor of matrices, by the iteration of torch.optim.Muon.

Private, read in torch 2.10, 2.13 and 2.14.1: ``torch.optim._muon._zeropower_via_newtonschulz(grad,
ns_coefficients, ns_steps, eps)``. What is public steps a weight: a weight of 0, stepped at rate 1,
holds the factor as well, after five more passes over memory that made Muon's step a fifth slower
than torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_layerlr.sharders.base import ParamGroup


def orthogonalise(asked: Sequence[tuple[Tensor, Sequence[int], ParamGroup]]) -> list[Tensor]:
    """What torch.optim.Muon makes of matrices, before any rate; each part of a fused one alone.

    Args:
        asked: (matrix, rows of each part, group with the settings). A matrix of bfloat16 is used
            up: it is normalised where it lies.
    """
    # Here: a torch that has moved it must not keep those from importing us who use no Muon.
    from torch.optim import _muon

    found: list[Tensor] = []
    for matrix, parts, group in asked:
        how = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        # Of a tall matrix torch's function takes the transpose itself, and returns it upright.
        factors = [
            _muon._zeropower_via_newtonschulz(rows, *how)
            for rows in torch.split(matrix, list(parts) or [matrix.shape[0]])
        ]
        found.append(factors[0] if len(factors) == 1 else torch.cat(factors))
    return found
