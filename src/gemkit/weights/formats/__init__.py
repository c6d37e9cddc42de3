"""The file formats: readers that give names, shapes and arrays, and their writers. No torch until an array is read.

`base.py` is what they have in common; `sniff.py` recognises a file's format and opens its reader.
"""
