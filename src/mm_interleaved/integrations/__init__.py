"""The model in other people's programs; each needs that program, which is an optional extra.

| module | program |
|---|---|
| `lmms_eval` | lmms-eval, through its entry point `lmms_eval.models` |
| `answering` | what needs no program: questions to documents, and answers |
"""
