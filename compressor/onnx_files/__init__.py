"""One network as an ONNX file, proven against torch: what the exporters that begin with ONNX share."""
