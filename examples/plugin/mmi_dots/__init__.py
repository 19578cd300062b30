"""A plug-in of mm-interleaved: images of dots. See pyproject.toml for what it adds, docs/guides/plugins.md for how."""
