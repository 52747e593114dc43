"""Other projects' settings of layer-wise rates, read into our config. No torch."""

from dist_layerlr.exchange.convert import FORMATS as FORMATS
from dist_layerlr.exchange.convert import Converted as Converted
from dist_layerlr.exchange.convert import convert as convert
