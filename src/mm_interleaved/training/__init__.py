"""Training: runs from YAML settings, with exact resumption, on one process or many."""
