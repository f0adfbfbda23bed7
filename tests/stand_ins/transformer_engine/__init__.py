"""What Megatron's wrappers of Transformer Engine 1.8 use of it, in plain torch, for a CPU.

Layers have the constructor arguments, parameter names and return values of the real ones.
"""

from transformer_engine import common, pytorch

__version__ = "1.8.0"
__all__ = ["common", "pytorch"]
