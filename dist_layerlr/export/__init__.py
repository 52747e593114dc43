"""Files for other programs: diffusers, transformers, PEFT and kohya's, under original names."""

from dist_layerlr.export.export import SAVED_CONFIG as SAVED_CONFIG
from dist_layerlr.export.export import adapter_config as adapter_config
from dist_layerlr.export.export import export_checkpoint as export_checkpoint
from dist_layerlr.export.export import export_weights as export_weights
