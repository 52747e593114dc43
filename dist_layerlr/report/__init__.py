"""What people read: the grid of learning rates, the explanation of one, the heat map. No torch."""

from dist_layerlr.report.grid import explain as explain
from dist_layerlr.report.grid import grid as grid
from dist_layerlr.report.heatmap import draw_grid as draw_grid
