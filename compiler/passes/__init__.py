"""One pass a file, named for what it does; the list with reasons is `compiler/pipeline.py`."""
