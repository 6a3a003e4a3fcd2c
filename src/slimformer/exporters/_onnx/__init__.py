"""The parts of the ONNX exporter: `trace` a model, `rewrite` its `graph`, write `int8` from `calibrate`d ranges, check `parity`.

`storing` writes the files, and `mixed` searches the matrices that stay in float.
"""
