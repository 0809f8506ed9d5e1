"""Replace fused operators of ONNX Runtime by operators whose weights can be quantized.

graph: replace the fused operators of a model, where that serves their weights or the target
maker: make the nodes that stand in for one fused operator
products: replace fused matrix products and convolutions
attention: replace attention with the projection inside, and attention as a whole
norms: replace fused normalizations, embeddings and GELUs
"""
