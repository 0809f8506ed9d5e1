"""Hold what a run found out, and show it.

report: hold everything that a run found out, for Python and as JSON
inputs: describe the samples
advice: point out what stands out, and what to do about it
terminal: lay the report out as tables for a terminal
page: render the report as one HTML page, from page.html
plots: draw the plots of the page as SVG
"""
