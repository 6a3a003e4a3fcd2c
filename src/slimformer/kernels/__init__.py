"""Int8 kernels that skip zeros: the compiled library of the package slimformer-kernels, called from Python and from ONNX Runtime."""

from slimformer.kernels.sessions import session as session
