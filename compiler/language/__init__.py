"""The language: YAML text -> tree with places (source) -> definitions (definitions) -> model graph (build)."""
