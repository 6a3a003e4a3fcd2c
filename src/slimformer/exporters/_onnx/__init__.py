"""The parts of the ONNX exporter."""
