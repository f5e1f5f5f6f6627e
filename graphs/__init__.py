"""Model descriptions (YAML), one file a model; `families/` holds the operator graphs that variants extend."""
