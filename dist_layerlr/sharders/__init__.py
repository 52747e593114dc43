"""Sharders: where the elements of each name live on this rank.

One file per sharder; none of them knows an optimizer.
"""

from dist_layerlr.sharders.base import Layout as Layout
from dist_layerlr.sharders.base import Piece as Piece
from dist_layerlr.sharders.base import Pieces as Pieces
from dist_layerlr.sharders.base import Sharder as Sharder
from dist_layerlr.sharders.base import Slice as Slice
from dist_layerlr.sharders.base import Span as Span
from dist_layerlr.sharders.base import Weight as Weight
from dist_layerlr.sharders.choose import sharder_of as sharder_of
from dist_layerlr.sharders.distinct import mark_distinct as mark_distinct
from dist_layerlr.sharders.model import materialize as materialize
from dist_layerlr.sharders.model import plan_model as plan_model
from dist_layerlr.sharders.model import unwrap as unwrap
from dist_layerlr.sharders.zero import partition_empty as partition_empty
