"""Sharing results: a run's groups, recipe, numbers and card to and from a folder or a Hub repository.

`push` and `pull` are in the modules of these names, `load_stage` in `loading`; nothing heavy is imported here.
"""
