"""The graph compiler: YAML in, ATB graph-construction code and a manifest out. Start reading at `pipeline.py`."""
