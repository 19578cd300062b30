"""The model in other programs, which are optional extras.

| module | program |
|---|---|
| `lmms_eval` | lmms-eval, through its entry point `lmms_eval.models` |
| `answering` | any: conversion of questions to documents, and answers |
"""
