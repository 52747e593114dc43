"""What people read: the grid of rates, the explanation of one, the heat map, the page. No torch."""

from dist_layerlr.report.grid import FOLDED as FOLDED
from dist_layerlr.report.grid import GRIDS as GRIDS
from dist_layerlr.report.grid import explain as explain
from dist_layerlr.report.grid import grid as grid
from dist_layerlr.report.heatmap import draw_grid as draw_grid
from dist_layerlr.report.over_time import draw_over_time as draw_over_time
from dist_layerlr.report.page import page as page
from dist_layerlr.report.page import plan_data as plan_data
from dist_layerlr.report.page import run_data as run_data
from dist_layerlr.report.page import write_page as write_page
from dist_layerlr.report.timeline import draw_step as draw_step
