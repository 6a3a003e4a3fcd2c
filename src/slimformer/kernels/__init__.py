"""Int8 kernels that skip zeros: the compiled library of the package slimformer-kernels, called from Python."""
