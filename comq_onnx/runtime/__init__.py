"""Run models, and know the machine they run on.

session: loads and runs models; the only module that imports ONNX Runtime.
device: chooses the device, CPU or GPU, and shows that it works.
memory: measures the memory, and limits this process to it.
"""
