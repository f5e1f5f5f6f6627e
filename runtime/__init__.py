"""The runtime: loads weights and an artifact, runs the generated code, schedules and samples. Start at `engine.py`."""
