"""What stands between the bare ONNX Runtime call and the public port, one step a file."""
