"""The optimizer: parameter groups or segments from a plan, its schedule, and what may step it."""

from dist_layerlr.optim.attach import attach as attach
from dist_layerlr.optim.attach import bind as bind
from dist_layerlr.optim.average import WeightAverage as WeightAverage
from dist_layerlr.optim.cells import CellMetrics as CellMetrics
from dist_layerlr.optim.cells import Reading as Reading
from dist_layerlr.optim.clip import clip_grad_norm as clip_grad_norm
from dist_layerlr.optim.follow import Follower as Follower
from dist_layerlr.optim.follow import follow as follow
from dist_layerlr.optim.groups import param_groups as param_groups
from dist_layerlr.optim.groups import scale_lrs as scale_lrs
from dist_layerlr.optim.readback import optimizer_state as optimizer_state
from dist_layerlr.optim.readback import read_back as read_back
from dist_layerlr.optim.schedule import PlanSchedule as PlanSchedule
from dist_layerlr.optim.schedule import Schedule as Schedule
from dist_layerlr.optim.schedulers import check_scheduler as check_scheduler
from dist_layerlr.optim.segmented import MakeOptimizer as MakeOptimizer
from dist_layerlr.optim.table_adamw import TableAdamW as TableAdamW
from dist_layerlr.optim.validate import check_ds_config as check_ds_config
from dist_layerlr.optim.validate import check_optimizer as check_optimizer
from dist_layerlr.optim.validate import check_sharding as check_sharding
