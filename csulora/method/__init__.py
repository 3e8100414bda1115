"""The mathematics, tensors in and tensors out; it knows no file and no adapter."""
