"""Quantization without a file format: `grids` puts tensors on grids of integers, `calibration` finds ranges in samples.

The ranges themselves are plain data in `core/ranges.py`; files with integers are written by `exporters/`.
"""
