"""Commands about a run that is there: advise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dist_layerlr.cli.command import Output, add_command, as_json
from dist_layerlr.report.advise import gather
from dist_layerlr.report.proposal import propose, to_dict, to_text

NOTHING, CHANGES, FEW = 0, 1, 4


def add_to(commands: Any) -> None:
    """Declare them."""
    advise = add_command(
        commands,
        "advise",
        _run_advise,
        text="say which parts of a run move far more or less than the rest, and what rates would"
        " change that; nothing is applied",
        examples=[
            "advise runs/latest",
            "advise runs/latest --json > advice.json",
            "advise runs/wan22 --network transformer_2",
        ],
        statuses={
            NOTHING: "nothing to change",
            CHANGES: "changes are proposed",
            FEW: "not enough rows to say anything",
        },
    )
    help_text = "the folder of a run, trained with per_layer_lr.log_grad_norms=true"
    advise.add_argument("run_folder", metavar="RUN", help=help_text)
    advise.add_argument(
        "--network", metavar="NAME", help="which one, where the run trains two experts"
    )


def _run_advise(args: argparse.Namespace) -> Output:
    folder = Path(args.run_folder)
    evidence = gather(folder, args.network)
    proposal = propose(evidence, folder)
    status = CHANGES if proposal.steer is not None else NOTHING
    status = status if evidence.enough else FEW
    if args.json:
        return as_json(to_dict(evidence, proposal)), status
    return to_text(evidence, proposal), status
