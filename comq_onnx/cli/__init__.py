"""Give the library a command line.

command: reads the command, runs it and prints the report
parameters: makes the options of the command
config_file: reads and writes configuration files
progress: shows bars for long steps
"""
