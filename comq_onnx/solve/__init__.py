"""Solve layers: find the codes of each weight that change the layer's output least. No onnx, no runtime.

layer: solve one layer, or several of one input, by any method
comq: the default method, and GPTQ for comparison
effort: how long the default method searches
problem: what is minimized for one matrix: visiting order, ridge, triangular factor
rounding: round one input after the other (Babai), the start of the descent; beams of roundings
descent: sweeps over the codes, refits of the scales, moves best first
ridge: choose the ridge on halves of the samples
few_inputs: solve problems of few inputs near-exactly
bitsplit: refine codes bit plane by bit plane
paper: the method of the authors of COMQ
grams: sums of rows and of their products
windows: take windows of a convolution out of its input
grid: the codes that a weight may take, and rounding to them
moments: the second moments of a layer's input, and the sums that make them
patches: Gram matrices of convolutions without their patches
output_error: what a quantized weight costs
rounding_error: what rounding to a grid loses
kernels: the inner loops, compiled by numba
compiled: how functions are compiled
parallel: threads over parts of the channels
gpu: the default method on torch tensors
"""
