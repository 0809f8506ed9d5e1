"""Read, prepare and write ONNX models, and know their layers.

float_model: open the source model, and load it as the reference for what is quantized
probe: run a part of a model for some of its values
source: find, read, check and identify model files
files: write files whole or not at all, and make directories that vanish
graph: change onnx-ir graphs, in the few operations that everything else uses
prepare: clean and fold a loaded model, raise its opset, and list its layers
fold: fold constants, and join operators
quantized: find the layers whose weights are quantized already
unfuse: replace fused operators of ONNX Runtime by operators whose weights can be quantized
half_precision: turn half-precision arithmetic into float32
judged: find the values by which a quantized model is judged
judged_session: run a model for these values
normalized: find values that a normalization makes alike in size
layers: list the layers of a graph, and select among them
op_kind: define the contract of a kind of layer
operators: describe matrix products and embeddings as kinds of layers, and list all kinds by operator
convolutions: describe convolutions as kinds of layers
transposed: describe transposed convolutions, and the phases that make them up
recurrent: describe the weights of LSTM, GRU and RNN, of the input and of the state, as kinds of layers
pickled: pickle models, as protobuf messages
states: add to a graph what computes the rows that these weights multiply
"""
