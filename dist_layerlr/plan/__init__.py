"""The plan: which learning rate and weight decay each name gets, from names and shapes alone.

No torch.
"""

from dist_layerlr.plan.build import build_plan as build_plan
from dist_layerlr.plan.components import register_component_rule as register_component_rule
from dist_layerlr.plan.config import PLAN_BLOCK as PLAN_BLOCK
from dist_layerlr.plan.config import Config as Config
from dist_layerlr.plan.config import load_config as load_config
from dist_layerlr.plan.depth import register_depth as register_depth
from dist_layerlr.plan.diff import PLAN_FILE as PLAN_FILE
from dist_layerlr.plan.diff import plan_diff as plan_diff
from dist_layerlr.plan.entries import ParamInfo as ParamInfo
from dist_layerlr.plan.entries import Plan as Plan
from dist_layerlr.plan.entries import PlanEntry as PlanEntry
from dist_layerlr.plan.names import ParamPath as ParamPath
from dist_layerlr.plan.names import base_name as base_name
from dist_layerlr.plan.names import canonical_name as canonical_name
from dist_layerlr.plan.names import is_lora_b as is_lora_b
from dist_layerlr.plan.names import natural_key as natural_key
from dist_layerlr.plan.names import parse as parse
from dist_layerlr.plan.optimizers import OPTIMIZERS_BLOCK as OPTIMIZERS_BLOCK
from dist_layerlr.plan.read import checkpoint_files as checkpoint_files
from dist_layerlr.plan.read import read_model as read_model
from dist_layerlr.plan.stacks import Location as Location
from dist_layerlr.plan.stacks import StackMap as StackMap
from dist_layerlr.plan.steer import Changes as Changes
from dist_layerlr.plan.steer import read_changes as read_changes
from dist_layerlr.plan.steer import steered as steered
