"""The runtime: loads weights and an artifact, executes the generated code, schedules and samples. Start at `engine.py`."""
