"""Printing: `rows.py` makes plain rows of an ATB graph, `render.py` puts them through a template."""
