"""Write what is solved into a graph, as a target wants it, and check the result.

emit: rewrite a graph, and make the quantized model
finish: half precision where it is asked for, and what the file tells of itself
half: turn float32 arithmetic into float16
weights: write the weight of a layer in its form
biases: write the bias of a layer, as floats or as int32
activations: write the pairs of QuantizeLinear and DequantizeLinear of activations
walls: keep products apart from operators that a runtime would join them with in float
codes: store integer codes in containers or as bit planes
expose: make weights inputs of the float model, to try quantized ones without a new session
nbits: write weight-only products as MatMulNBits, in place of the QDQ form
provenance: make the metadata of the file
check: check a written model against its plan and the rules of its target
size: compare its size with that of its source
"""
