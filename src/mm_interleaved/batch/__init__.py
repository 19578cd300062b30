"""Generation for files of documents: records of results, and work that any number of processes share.

| module | |
|---|---|
| `records` | the record of a finished document, and its image files |
| `shared` | shards of a file that processes claim, finish and merge |
"""
