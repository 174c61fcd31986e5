"""Reports of runs as pages: one HTML file each, with pictures and curves in it, which needs no network and no script.

run_page.py          one run: bits, figures of the eye, curves, images and what each costs, options
comparison_page.py   several runs side by side
gallery.py           images collected while a test set is evaluated
figures.py           what elbo.json says; curves.py, what metrics.csv says
charts.py            charts as SVG
page.py, page.css    what all pages share; markup.py, HTML that is escaped
"""
