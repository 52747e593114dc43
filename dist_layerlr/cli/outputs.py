"""Commands about files: predict (streaming from a list of names), export (from a checkpoint)."""

from __future__ import annotations

import argparse
from typing import Any

from dist_layerlr.cli.command import MODEL_HELP, Output, add_command, as_json
from dist_layerlr.files import read_json
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.predict import layout_from_names, predict
from dist_layerlr.offload.prediction import Machine, Workload
from dist_layerlr.plan.read import read_model


def add_to(commands: Any) -> None:
    """Declare them."""
    _add_predict(commands)
    _add_export(commands)


def _add_predict(commands: Any) -> None:
    predict = add_command(
        commands,
        "predict",
        _run_predict,
        text="what streaming blocks from the host will cost: time, memory, hidden or not",
        examples=["predict model.safetensors --tokens 32760 --gb-s 50 --tflops 400"],
    )
    predict.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    predict.add_argument(
        "--tokens", type=int, required=True, help="of one microbatch on one device"
    )
    predict.add_argument(
        "--sequence", type=int, help="tokens that attend to each other (default: all)"
    )
    predict.add_argument(
        "--gb-s", type=float, required=True, help="pinned host to device, 1e9 bytes per second"
    )
    predict.add_argument(
        "--tflops", type=float, required=True, help="achieved, 1e12 operations per second"
    )
    # Read off the policy, so that a prediction is of what `stream` does by default.
    window = StreamPolicy().prefetch_window
    predict.add_argument(
        "--window", type=int, default=window, help=f"units fetched ahead (default {window})"
    )
    predict.add_argument(
        "--resident", type=int, default=0, help="units that stay on the device (default 0)"
    )
    predict.add_argument("--full", action="store_true", help="full finetune instead of LoRA")
    predict.add_argument(
        "--no-checkpointing", action="store_true", help="blocks are not computed again in backward"
    )
    predict.add_argument(
        "--micro-steps", type=int, default=1, help="microbatches per step (default 1)"
    )
    predict.add_argument(
        "--device-bytes", type=float, default=2.0, help="per parameter on the device (default 2)"
    )
    predict.add_argument(
        "--host-bytes", type=float, help="per parameter on the host (default: as on the device)"
    )
    predict.add_argument(
        "--host-gb-s", type=float, help="memory bandwidth of the host, for a CPU optimizer"
    )


def _add_export(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        _run_export,
        text="write the weights of a checkpoint as files that diffusers, transformers, PEFT,"
        " ComfyUI or kohya's programs load",
        examples=[
            "export runs/latest lora --format peft",
            "export runs/latest model --format diffusers --base pretrained/transformer",
        ],
    )
    where = "a checkpoint folder, or a folder of them or of a run: then the newest"
    export.add_argument("checkpoint", metavar="CKPT", help=where)
    export.add_argument("output", metavar="OUT", help="folder to write")
    formats = ("diffusers", "transformers", "peft", "pipeline", "comfyui", "kohya")
    export.add_argument(
        "--format", required=True, choices=formats, help="full weights (the first two), or a LoRA"
    )
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as trained")
    export.add_argument(
        "--base",
        metavar="DIR",
        help="folder of the trained model: its config.json is copied, or names its class",
    )
    export.add_argument(
        "--adapter", default="default", metavar="NAME", help="PEFT's name of the adapter"
    )
    export.add_argument(
        "--adapter-config",
        metavar="FILE",
        help="adapter_config.json, where the checkpoint has none",
    )


def _run_predict(args: argparse.Namespace) -> Output:
    layout = layout_from_names(
        read_model(args.model),
        full=args.full,
        resident=args.resident,
        device_bytes=args.device_bytes,
        host_bytes=args.host_bytes,
    )
    work = Workload(
        tokens=args.tokens,
        sequence=args.sequence,
        checkpointing=not args.no_checkpointing,
        micro_steps=args.micro_steps,
    )
    machine = Machine(gb_s=args.gb_s, tflops=args.tflops, host_gb_s=args.host_gb_s)
    prediction = predict(layout, work, machine, window=args.window)
    if args.json:
        return as_json(prediction.to_dict()), 0
    return prediction.table() + "\n", 0


def _run_export(args: argparse.Namespace) -> Output:
    # Imported here: predict runs where torch is not installed.
    import torch

    from dist_layerlr.export.export import export_checkpoint

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    files = export_checkpoint(
        args.checkpoint,
        args.output,
        format=args.format,
        dtype=dtypes.get(args.dtype),
        adapter=args.adapter,
        config=read_json(args.adapter_config) if args.adapter_config else None,
        base=args.base,
    )
    if args.json:
        return as_json({"wrote": [str(file) for file in files]}), 0
    return "".join(f"wrote {file}\n" for file in files), 0
