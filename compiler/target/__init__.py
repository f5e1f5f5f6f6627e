"""What is compiled for: devices as data, what is legal on them, and the environment they run in."""
