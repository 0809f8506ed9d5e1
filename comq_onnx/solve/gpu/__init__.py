"""Solve layers by the default method on a GPU, from moments that are torch tensors.

solver: the default method and GPTQ
problem: what is minimized, for all groups at once
clip: fit scale and zero point to the span of a weight
rounding: round one input after the other (Babai), at several scales at once
descent: sweeps over the codes and refits of the scales
moves: moves of one code and of two, best first, in all channels at once
ridge: choose the ridge on halves of the samples
output_error: what a quantized weight costs
step: the loop inside a block of inputs, in torch or Triton
triton_step: that loop as a Triton kernel
"""
