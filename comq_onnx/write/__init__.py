"""Write what is solved into a graph, as a target wants it, and check the result.

emit: rewrites a graph, and makes the quantized model
weights: writes the weight of a layer in its form
biases: writes the bias of a layer, as floats or as int32
activations: writes the pairs of QuantizeLinear and DequantizeLinear of activations
codes: stores integer codes in containers or as bit planes
expose: makes weights inputs of the float model, to try quantized ones without a new session
provenance: makes the metadata of the file
check: checks a written model against its plan and the rules of its target
"""
