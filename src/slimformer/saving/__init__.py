"""Model folders: `checkpoint` writes and loads them, `sparse` leaves zeros out of the weights' file, `tensors` names weights by a digest.

`auto_classes` teaches our folders to transformers' Auto classes, `hub` fetches a folder that the user names by its hub id.
"""
