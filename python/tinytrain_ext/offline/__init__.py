"""The offline stage, on a server: pre-training, meta-training, evaluation. Needs PyTorch.

`commands` and `recipes` are what the command line reads, and need none.
"""
