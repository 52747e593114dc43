"""The parts of ``launch/train.py``: families, data, engines, loop."""
