"""Run the model on samples, segment by segment, and solve its layers on the way.

walk: go through the stages and solve the layers of each
stages: divide a graph into stages
segment: run the nodes of one stage
recurrent_rows: add the rows of recurrent layers to the model that is walked
leading: how many samples each stage needs, and their groups
stage_costs: predict which share of the walk each stage takes
passage: take a shard of the samples from cut to cut, in float and quantized
crew: have all shards taken, and sum up what they show
cut_tensors: keep the tensors between two stages
layer_moments: sum the moments of a layer's input
shared_weights: find the layers that share a weight with an earlier one
layer_solver: solve the layers of a stage, each weight once
solved_form: take weights apart for the solver, and put solutions together
observed_ranges: gather the ranges of activations, and make grids of them
integer_loss: take layers out of integers whose activations alone make noise of the outputs
finite: refuse numbers that cannot be calibrated on
"""
