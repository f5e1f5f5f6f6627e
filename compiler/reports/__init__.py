"""What users read off a compiled model: show, explain, diff, plan, the picture, and the generated pages of docs/."""
