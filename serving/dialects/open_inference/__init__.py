"""The Open Inference Protocol (v2): a policy as a model, its arrays as named tensors."""
