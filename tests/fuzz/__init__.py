"""Damaged and hostile input for every command: `make fuzz`.

A *subject* (`subjects/`) starts from good files, changes them at random and names the commands that
read them. `rules.py` runs each command and asserts the three rules: no traceback, no hang, no file
outside the places named. A *case* is a subject with a number; the number alone makes it again.
"""
