"""Read or make the samples that a model is calibrated on and compared on.

load: read samples from whatever the caller names, the way in
samples: hold samples, the description of a model's input, and what a model tells about its samples
dataset: load the samples of a run, and hold some of them back to compare on
fit: check arrays against the inputs of a model
arrays: read .npz and .npy files, and the test data of ONNX models
images: read pictures, or draw them (a package)
text: read lines of text through a tokenizer
chat: write conversations out by the chat template of a tokenizer
language_inputs: make the inputs that language models have beside their tokens
next_token: tell whether a model predicts the next token
cache_shapes: find how many heads a past has and how wide each is, where the inputs of the model leave that free
audio: read windows of .wav files
readers: take samples from Python code
synthetic: make samples where there are none
clues: find out what a model tells about its samples
decoding: make the feeds of one step of decoding
padding: find the positions that an attention mask hides
inspection: describe samples for a person
model_folder: find configurations beside a model
"""
