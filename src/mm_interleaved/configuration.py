"""YAML files and `key=value` overrides as typed dataclasses."""
