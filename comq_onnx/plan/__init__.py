"""Plan a quantization: which values are quantized, how each weight is written, and with how many bits.

plan: define the plan, one frozen value that goes from stage to stage
make: make the plan of a prepared model
faithful: prepare the source model, and check that its outputs stay as they were
subgraphs: make the layers inside If, Loop and Scan reachable for calibration
tied: find embeddings that are the weight of a product too, and store both once
activations: choose the activations that are quantized, and the layers that run in integers
integer_gain: predict times, and leave the layers that integers would make slower in floats
initial_bits: give each layer its bits before any survey
forms: choose the form, the grid and the container of each weight
nbits: choose the products that are written as MatMulNBits
half: find the values that are too large for float16
smoothing: even out the channels of activations
given_pairs: read the QuantizeLinear and DequantizeLinear that the source has
activation_grid: define the grid of an activation, its scale and its zero point
observed_range: gather the range of an activation from samples
ranges: choose the range of an activation by what its rounding does to the layers that read it
solved: define the plan with the solutions of its layers
"""
