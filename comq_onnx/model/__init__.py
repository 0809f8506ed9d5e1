"""Read, prepare and write ONNX models, and know their layers.

source: finds, reads, checks and identifies model files.
files: writes files whole or not at all, and makes directories that vanish.
graph: changes onnx-ir graphs, in the few operations that everything else uses.
prepare: cleans and folds a loaded model, raises its opset, and lists its layers.
quantized: finds the layers whose weights are quantized already.
half_precision: turns half-precision arithmetic into float32.
layers: lists the layers of a graph, and selects among them.
op_kind: defines the contract of a kind of layer.
operators: matrix products and embeddings as kinds of layers, and all kinds by operator.
convolutions: convolutions and their transposes as kinds of layers.
"""
