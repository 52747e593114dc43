"""Weights: read from safetensors files straight into shards, and gathered from them."""

from dist_layerlr.weights.gather import find_not_finite as find_not_finite
from dist_layerlr.weights.load import check_pretrained as check_pretrained
from dist_layerlr.weights.load import load_pretrained as load_pretrained
from dist_layerlr.weights.load import pretrained_tensors as pretrained_tensors
from dist_layerlr.weights.tensorfile import FileTensor as FileTensor
from dist_layerlr.weights.tensorfile import stored_tensors as stored_tensors
