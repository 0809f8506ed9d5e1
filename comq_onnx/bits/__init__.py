"""Choose the bits of each layer under a budget.

choose: chooses the bits, solves the layers, and tries again until an accuracy is kept
survey: measures what it costs to quantize each layer
tradeoff: finds the best allocation of bits under a budget of bytes, of mean bits or of noise
knapsack: solves the multiple-choice knapsack behind that
drop_check: checks whether a model keeps the accuracy that is asked for
"""
