"""Turn pictures into the input of a model.

read: read files of pictures, or pictures in memory
preprocess: hold presets, and read the configurations that lie beside models
pixels: turn the pixels of one picture into the array of an input
guess: guess the preprocessing from the model itself
drawing: draw procedural pictures
"""
