"""What Megatron uses of NVIDIA Apex's fused LayerNorm, in plain torch, for a CPU."""
