"""The model in other programs, which are optional extras.

| module | program |
|---|---|
| `lmms_eval` | lmms-eval, through its entry point `lmms_eval.models` |
| `ray_data` | Ray Data: batch generation |
| `ray_serve` | Ray Serve: the server |
| `answering` | any: conversion of questions to documents, and answers |
"""
