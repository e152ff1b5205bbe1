"""Published results redone in miniature, each a script with a stated protocol: experiments, which compute.

`python recipes/reproductions/r1_frontier.py [--out FOLDER]` prints a table and, where a folder is given, draws the
figure there. docs/reproductions.md holds what they gave.
"""
