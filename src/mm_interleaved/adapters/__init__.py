"""Adapters (LoRA, through PEFT): which layers they change, their folders, loading and merging."""
