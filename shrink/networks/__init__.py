"""Networks as code: Chainer's classes, brought to the one graph that shrink knows, ONNX."""
