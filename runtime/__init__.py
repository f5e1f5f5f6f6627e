"""The runtime: loads weights and an artifact, runs the generated code, schedules and samples. Start in `engine/`."""
