"""Know what the runtimes run that models are written for.

target: the type of a target: the QDQ forms that a runtime executes, as data.
catalog: the targets; adding one is adding a constant.
costs: the time that operators take on a target, where it was measured.
"""
