"""Jinja templates, one folder a target. They hold loops and prepared words only."""
