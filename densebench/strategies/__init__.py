"""The strategies, one file each. `densebench.registry` imports every file here when a name is looked up.

How to add one: README.md in this folder.
"""
