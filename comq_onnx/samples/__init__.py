"""Read or make the samples that a model is calibrated on and compared on.

load: read samples from whatever the caller names, the way in
samples: hold samples, the description of a model's input, and what a model tells about its samples
fit: check arrays against the inputs of a model
arrays: read .npz and .npy files, and the test data of ONNX models
images: read pictures, or draw them (a package)
text: read lines of text through a tokenizer
language_inputs: make the inputs that language models have beside their tokens
audio: read windows of .wav files
readers: take samples from Python code
synthetic: make samples where there are none
clues: find out what a model tells about its samples
padding: find the positions that an attention mask hides
inspection: describe samples for a person
model_folder: find configurations beside a model
"""
