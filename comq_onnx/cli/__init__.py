"""Give the library a command line.

command: read the command, run it and print the report
parameters: make the options of the command
config_file: read and write configuration files
demo: run the command on a model that comes with the package
progress: show bars for long steps
"""
