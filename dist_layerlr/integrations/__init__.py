"""The plan inside other people's trainers. Each module imports its library inside functions."""

from dist_layerlr.integrations.accelerate import prepare_accelerate as prepare_accelerate
from dist_layerlr.integrations.deepspeed import initialize_deepspeed as initialize_deepspeed
from dist_layerlr.integrations.lightning import LayerLRLightning as LayerLRLightning
from dist_layerlr.integrations.transformers import LayerLRTrainer as LayerLRTrainer
from dist_layerlr.integrations.transformers_callback import LayerLRCallback as LayerLRCallback
