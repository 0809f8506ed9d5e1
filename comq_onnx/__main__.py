"""python -m comq_onnx: the command line."""

from comq_onnx.cli.command import main

main()
