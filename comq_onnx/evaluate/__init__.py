"""Run two models on the same samples: compare outputs and times, and count the kernels that the runtime executes.

evaluation: compare a quantized model with its source, and warn of what stands out
comparison: compare any two models
outputs: run models on the same samples, and compare their outputs
language: find the logits over a vocabulary, and the tokens that really follow
levels: tell where ONNX Runtime's default optimizations change the outputs
speed: measure how long models take, in turn
kernels: count the kernels that ONNX Runtime executes
"""
