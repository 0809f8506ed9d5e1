"""Choose the bits of each layer under a budget.

choose: choose the bits, solve the layers, and try again until an accuracy is kept
survey: measure what it costs to quantize each layer
perturbation: quantize one group of layers at a time, and run what lies behind it
tradeoff: find the best allocation of bits under a budget of bytes, of mean bits or of noise
knapsack: solve the multiple-choice knapsack behind that
drop_check: check whether a model keeps the accuracy that is asked for
"""
