"""Run the model on samples, segment by segment, and solve its layers on the way.

walk: goes through the stages and solves the layers of each
stages: divides a graph into stages
segment: runs the nodes of one stage
cut_tensors: keeps the tensors between two stages
layer_moments: sums the moments of a layer's input
layer_solver: solves the layers of a stage, each weight once
observed_ranges: gathers the ranges of activations, and makes grids of them
finite: refuses numbers that cannot be calibrated on
"""
