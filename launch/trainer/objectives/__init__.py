"""What a training step minimises: one file for each objective; families name theirs."""

from launch.trainer.objectives.base import FitsPipeline as FitsPipeline
from launch.trainer.objectives.base import HasLevels as HasLevels
from launch.trainer.objectives.base import Noted as Noted
from launch.trainer.objectives.base import Objective as Objective
