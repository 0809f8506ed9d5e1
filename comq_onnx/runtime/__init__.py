"""Run models, and know the machine they run on.

session: loads and runs models; the only module that runs ONNX Runtime.
device: chooses the device, CPU or GPU, and shows that it works.
memory: measures the memory, and limits this process to it.
half: turns float32 arithmetic into float16.
"""
