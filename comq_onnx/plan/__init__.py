"""Plan a quantization: which values get integers, how each weight is written, and with how many bits.

plan: defines the plan, one frozen value that goes from stage to stage
make: makes the plan of a prepared model
faithful: prepares the source model, and checks that its outputs stay as they were
subgraphs: makes the layers inside If, Loop and Scan reachable for calibration
activations: chooses the activations that are quantized, and the layers that run in integers
integer_gain: predicts times, and leaves the layers that integers would make slower in floats
initial_bits: gives each layer its bits before any survey
forms: chooses the form, the grid and the container of each weight
smoothing: evens out the channels of activations
activation_grid: defines the scale and the zero point of an activation
observed_range: gathers the range of an activation from samples
ranges: chooses the range of an activation by what its rounding does to the layers that read it
solved: defines the plan with the solutions of its layers
"""
