"""Declare every option once.

options: declare the options of the library and of the command
samples: declare those that say how samples are read
option: define what the declaration of an option says
keywords: type the options as keywords; made by tools/option_keywords.py
spelling: spell options as configuration files and command lines have them
budgets: read budgets: the size of a file, an accuracy to keep
"""
