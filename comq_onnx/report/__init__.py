"""Hold what a run found out, and show it.

report: hold everything that a run found out, for Python and as JSON
build: build the report of a run, or of a plan
flow: find out which layers a layer reads
changes: show the weights of the worst layers, and samples whose answers changed
inputs: describe the samples
advice: point out what stands out, and what to do about it
terminal: lay the report out as tables for a terminal
page: render the report as one HTML page, from page.html
several: compare several runs, as one table and in files
several_page: render that comparison as one HTML page, from several.html
read: read reports that were written as JSON
plots: draw the plots of the page as SVG
network: draw the layers as a network
"""
