"""Declare every option once.

options: declares the options of the library and of the command
samples: declares those that say how samples are read
option: defines the declaration of an option
keywords: types the options as keywords; made by tools/option_keywords.py
spelling: spells options as configuration files and command lines have them
budgets: reads budgets: the size of a file, an accuracy to keep
"""
