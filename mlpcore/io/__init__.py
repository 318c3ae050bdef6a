"""Files: networks, checkpoints, ONNX, and models of other libraries."""
