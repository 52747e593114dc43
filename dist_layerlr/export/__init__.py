"""Files under original names: for diffusers, transformers, PEFT, ComfyUI and kohya's programs."""

from dist_layerlr.export.adapter_files import adapter_formats as adapter_formats
from dist_layerlr.export.export import SAVED_CONFIG as SAVED_CONFIG
from dist_layerlr.export.export import adapter_config as adapter_config
from dist_layerlr.export.export import export_checkpoint as export_checkpoint
from dist_layerlr.export.export import export_weights as export_weights
