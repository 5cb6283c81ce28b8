"""The kernel explorer: one HTML file in which every row of a network's kernels can be looked at.

codes.py writes weights as short numbers, collect.py takes them from a network, page.py makes the page: Bokeh draws,
page.js chooses what is drawn.
"""
